//! A bearer token that is kept in a file and read again every minute, as client-go does. kube's own reader takes the file
//! as it is, and most files end with a newline, which no header may hold.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::header::{AUTHORIZATION, HeaderValue};
use http::{HeaderMap, Request};
use tokio::time::Instant;

/// The kubelet renews projected tokens well before they expire; client-go reads them this often.
const PERIOD: Duration = Duration::from_mins(1);

/// The token of one file. Clones share it.
#[derive(Clone)]
pub(super) struct TokenFile {
    path: PathBuf,
    /// The last good header and when it was read.
    cached: Arc<Mutex<(HeaderValue, Instant)>>,
}

impl TokenFile {
    /// Reads the file for the first time.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let cached = Arc::new(Mutex::new((read(path)?, Instant::now())));
        Ok(Self {
            path: path.to_owned(),
            cached,
        })
    }

    /// Adds the token to a request. A file that has gone away meanwhile leaves the last token in use (as in client-go,
    /// kubernetes/kubernetes#68164).
    pub(super) fn authorize<B>(&self, mut request: Request<B>) -> Request<B> {
        let mut cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        if cached.1.elapsed() >= PERIOD {
            let header = read(&self.path).unwrap_or_else(|_| cached.0.clone());
            *cached = (header, Instant::now());
        }
        let headers: &mut HeaderMap = request.headers_mut();
        headers.insert(AUTHORIZATION, cached.0.clone());
        request
    }
}

fn read(path: &Path) -> io::Result<HeaderValue> {
    let text = fs::read_to_string(path)?;
    let mut header = HeaderValue::try_from(format!("Bearer {}", text.trim()))
        .map_err(|error| io::Error::other(error.to_string()))?;
    header.set_sensitive(true);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(token: &TokenFile) -> String {
        let request = token.authorize(Request::new(()));
        request.headers()[AUTHORIZATION].to_str().unwrap().to_owned()
    }

    #[tokio::test(start_paused = true)]
    async fn a_renewed_token_is_in_use_after_a_minute_and_outlives_its_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "first\n").unwrap();
        let token = TokenFile::open(file.path()).unwrap();
        fs::write(file.path(), "second\n").unwrap();
        assert_eq!(sent(&token), "Bearer first");
        tokio::time::advance(PERIOD).await;
        assert_eq!(sent(&token), "Bearer second");
        drop(file);
        tokio::time::advance(PERIOD).await;
        assert_eq!(sent(&token), "Bearer second");
    }
}
