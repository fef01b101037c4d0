//! A bearer token that is kept in a file and read again every minute, as client-go does. kube's own reader takes the file
//! as it is, and most files end with a newline, which no header may hold.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::Request;
use http::header::{AUTHORIZATION, HeaderValue};
use tokio::time::Instant;

/// The kubelet renews projected tokens well before they expire; client-go reads them this often.
const PERIOD: Duration = Duration::from_mins(1);

/// The token of one file. Clones share it.
#[derive(Clone)]
pub(super) struct TokenFile {
    path: PathBuf,
    cached: Arc<Mutex<Cached>>,
}

struct Cached {
    /// The last good header; nothing while the file never had one.
    header: Option<HeaderValue>,
    /// When it was read.
    read: Instant,
    /// Counts the headers there have been.
    generation: u64,
}

impl Cached {
    /// Takes what the file holds now.
    fn take(&mut self, header: HeaderValue) {
        self.read = Instant::now();
        if self.header.as_ref() != Some(&header) {
            self.header = Some(header);
            self.generation += 1;
        }
    }
}

impl TokenFile {
    /// Reads the file for the first time, when it must hold a token.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self::new(path, Some(read(path)?)))
    }

    /// Reads the file for the first time, where there is another token until it holds one.
    pub(super) fn open_beside_token(path: &Path) -> Self {
        Self::new(path, read(path).ok())
    }

    fn new(path: &Path, header: Option<HeaderValue>) -> Self {
        let read = Instant::now();
        Self {
            path: path.to_owned(),
            cached: Arc::new(Mutex::new(Cached {
                header,
                read,
                generation: 0,
            })),
        }
    }

    /// Sets the token of a request. A file that has gone away or is being written leaves the last token in use, and is read
    /// again for the next request (as in client-go, kubernetes/kubernetes#68164).
    pub(super) fn authorize<B>(&self, mut request: Request<B>) -> Request<B> {
        let mut cached = self.lock();
        if (cached.header.is_none() || cached.read.elapsed() >= PERIOD)
            && let Ok(header) = read(&self.path)
        {
            cached.take(header);
        }
        if let Some(header) = &cached.header {
            request.headers_mut().insert(AUTHORIZATION, header.clone());
        }
        request
    }

    /// Tells which token is in use, for [`renew`](Self::renew).
    pub(super) fn generation(&self) -> u64 {
        self.lock().generation
    }

    /// Reads the file before its time: the token that was in use then, or a later one, was refused. Returns whether there is
    /// another one than then.
    pub(super) fn renew(&self, refused: u64) -> bool {
        let mut cached = self.lock();
        if cached.generation == refused
            && let Ok(header) = read(&self.path)
        {
            cached.take(header);
        }
        cached.generation != refused
    }

    fn lock(&self) -> MutexGuard<'_, Cached> {
        self.cached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(path: &Path) -> io::Result<HeaderValue> {
    let text = fs::read_to_string(path)?;
    let token = text.trim();
    if token.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the file is empty"));
    }
    let mut header = HeaderValue::try_from(format!("Bearer {token}"))
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

    #[tokio::test(start_paused = true)]
    async fn a_token_that_was_refused_is_read_again_at_once() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "first\n").unwrap();
        let token = TokenFile::open(file.path()).unwrap();
        let used = token.generation();
        assert!(!token.renew(used), "there is no other");
        fs::write(file.path(), "second\n").unwrap();
        for _ in 0..2 {
            assert!(token.renew(used), "each request that had the first one is told");
        }
        assert_eq!(sent(&token), "Bearer second");
        assert!(!token.renew(token.generation()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_is_being_written_leaves_the_last_token_in_use() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(TokenFile::open(file.path()).is_err(), "an empty file was taken");
        fs::write(file.path(), "first\n").unwrap();
        let token = TokenFile::open(file.path()).unwrap();
        tokio::time::advance(PERIOD).await;
        fs::write(file.path(), "").unwrap();
        assert_eq!(sent(&token), "Bearer first");
        fs::write(file.path(), "second\n").unwrap();
        assert_eq!(sent(&token), "Bearer second");
    }

    #[test]
    fn a_file_beside_a_token_wins_once_it_holds_one() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let token = TokenFile::open_beside_token(file.path());
        let mut request = Request::new(());
        request
            .headers_mut()
            .insert(AUTHORIZATION, HeaderValue::from_static("Bearer inline"));
        let request = token.authorize(request);
        assert_eq!(request.headers()[AUTHORIZATION], "Bearer inline");
        fs::write(file.path(), "file").unwrap();
        assert_eq!(token.authorize(request).headers()[AUTHORIZATION], "Bearer file");
    }
}
