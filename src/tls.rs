//! TLS towards clients: a local certificate authority, made once on this machine, and a certificate for each name that a
//! client asks for. TLS towards pods whose ports speak it.

mod authority;
mod backend;
mod leaf;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::server::ServerSessionMemoryCache;

pub use authority::CertificateAuthority;
pub use backend::{Trust, client_config};
pub use leaf::Leaves;

/// Sessions that may be resumed: enough for many short connections of many clients, little memory.
const SESSIONS: usize = 4096;

/// The protocols offered by ALPN, the preferred one first.
const ALPN: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the authority cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// A file of the authority holds something else.
    #[error("{} cannot be used ({reason})", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A certificate cannot be made.
    #[error("cannot make a certificate: {0}")]
    Issue(#[from] rcgen::Error),
    /// The TLS library refuses a setting or a certificate.
    #[error("cannot set up TLS: {0}")]
    Library(#[from] rustls::Error),
}

/// Makes the server's side of TLS 1.2 and 1.3 with certificates from `authority`, made on demand.
///
/// # Errors
/// [`Error::Library`] or [`Error::Issue`].
pub fn server_config(authority: CertificateAuthority) -> Result<Arc<ServerConfig>, Error> {
    let leaves = Leaves::new(authority)?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(leaves));
    config.alpn_protocols = ALPN.map(<[u8]>::to_vec).into();
    config.session_storage = ServerSessionMemoryCache::new(SESSIONS);
    config.ticketer = aws_lc_rs::Ticketer::new()?;
    Ok(Arc::new(config))
}
