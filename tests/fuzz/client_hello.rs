//! TLS from its first byte: a bad hello ends in an alert, never in clear text or at a pod, and a good one gets a certificate for
//! its name that the authority may give.

use std::sync::{Arc, LazyLock};

use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::Acceptor;
use rustls::{ClientConfig, ClientConnection, Error, RootCertStore, ServerConnection};

use crate::double::{TLS, exchange};

/// The first bytes of a handshake record, which decide that a connection is TLS.
const RECORD: &[u8] = &[0x16, 3];

/// The types of records, from `change_cipher_spec` to `application_data` (RFC 8446 section 5.1).
const KINDS: std::ops::RangeInclusive<u8> = 20..=23;
const ALERT: u8 = 21;

/// A client that trusts the local authority and nobody else.
static CLIENT: LazyLock<Arc<ClientConfig>> = LazyLock::new(|| {
    let mut roots = RootCertStore::empty();
    let authority =
        CertificateDer::from_pem_slice(TLS.1.as_bytes()).expect("the authority has a certificate");
    roots
        .add(authority)
        .expect("the authority's certificate is valid");
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("the library knows its own versions");
    Arc::new(config.with_root_certificates(roots).with_no_client_auth())
});

/// The input is what the client sends behind the first two bytes.
pub fn check(data: &[u8]) {
    let sent = [RECORD, data].concat();
    let exchange = exchange(&sent, 1 << 16);
    assert!(exchange.requests.is_empty(), "a hello has reached the pod");
    let (mut answer, mut alerts) = (&*exchange.answer, 0);
    while !answer.is_empty() {
        let record = answer.get(..5).expect("a record's header is cut off");
        assert!(
            KINDS.contains(&record[0]) && record[1] == 3,
            "clear text: {}",
            answer.escape_ascii()
        );
        alerts += usize::from(record[0] == ALERT);
        let length = usize::from(u16::from_be_bytes([record[3], record[4]]));
        answer = answer.get(5 + length..).expect("a record is cut off");
    }
    match hello(&sent) {
        Hello::Bad => assert!(alerts > 0, "a bad hello is told nothing"),
        Hello::Good(Some(name)) => certificate(&name),
        Hello::Good(None) | Hello::Unfinished => {}
    }
}

/// What a hello is to another reader.
enum Hello {
    Bad,
    Unfinished,
    /// The name that it asks for.
    Good(Option<String>),
}

fn hello(sent: &[u8]) -> Hello {
    let mut acceptor = Acceptor::default();
    let mut rest = sent;
    while !rest.is_empty() {
        if acceptor.read_tls(&mut rest).is_err() {
            return Hello::Bad;
        }
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => {
                return Hello::Good(accepted.client_hello().server_name().map(str::to_owned));
            }
            Err(_) => return Hello::Bad,
        }
    }
    Hello::Unfinished
}

/// A client that asks for `name` gets a certificate that it can verify exactly if the authority may speak for that name.
fn certificate(name: &str) {
    let Ok(server_name) = ServerName::try_from(name.to_owned()) else {
        return;
    };
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    let within = |zone: &str| {
        name.strip_suffix(zone)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    let ours = within("cluster.local") || within("localhost");
    match handshake(server_name) {
        Ok(()) => assert!(ours, "the authority speaks for {name:?}"),
        Err(error) => assert!(!ours, "no certificate for {name:?}: {error}"),
    }
}

fn handshake(name: ServerName<'static>) -> Result<(), Error> {
    let mut client = ClientConnection::new(CLIENT.clone(), name)?;
    let mut server = ServerConnection::new(TLS.0.clone())?;
    while client.is_handshaking() {
        let mut flight = Vec::new();
        client.write_tls(&mut flight).expect("a vector takes everything");
        let mut rest = &*flight;
        while !rest.is_empty() {
            server.read_tls(&mut rest).expect("memory has no errors");
            server.process_new_packets()?;
        }
        let mut flight = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut flight).expect("a vector takes everything");
        }
        let mut rest = &*flight;
        while !rest.is_empty() {
            client.read_tls(&mut rest).expect("memory has no errors");
            client.process_new_packets()?;
        }
    }
    Ok(())
}
