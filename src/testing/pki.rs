//! The certificates of the double: its authority, its server certificate, client certificates.

use std::io;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::PrivateKeyDer;

/// A certificate authority that lives as long as the cluster.
#[derive(Debug)]
pub(super) struct Pki {
    /// Authority key and certificate.
    authority: CertifiedIssuer<'static, KeyPair>,
}

/// A client certificate and its key.
#[derive(Debug)]
pub(super) struct ClientCertificate {
    /// Certificate, PEM.
    pub(super) certificate: String,
    /// Private key, PEM.
    pub(super) key: String,
    /// Certificate, DER: what the TLS layer will see.
    pub(super) der: Vec<u8>,
}

impl Pki {
    /// Makes a fresh authority.
    pub(super) fn new() -> io::Result<Self> {
        let mut params = named("kubernetes")?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().map_err(io::Error::other)?;
        Ok(Self {
            authority: CertifiedIssuer::self_signed(params, key).map_err(io::Error::other)?,
        })
    }

    /// The authority's certificate, PEM.
    pub(super) fn authority_pem(&self) -> String {
        self.authority.pem()
    }

    /// TLS settings of the API server: own certificate, client certificates asked for but not required.
    pub(super) fn server_config(&self) -> io::Result<ServerConfig> {
        let mut params = named("kube-apiserver")?;
        let names = ["127.0.0.1", "localhost", "kubernetes.default.svc"].map(str::to_owned);
        params.subject_alt_names = CertificateParams::new(names.to_vec())
            .map_err(io::Error::other)?
            .subject_alt_names;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let certificate = params
            .signed_by(&key, &self.authority)
            .map_err(io::Error::other)?;

        let mut roots = RootCertStore::empty();
        roots
            .add(self.authority.der().clone())
            .map_err(io::Error::other)?;
        let provider = Arc::new(default_provider());
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .allow_unauthenticated()
            .build()
            .map_err(io::Error::other)?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(io::Error::other)?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_client_cert_verifier(clients)
            .with_single_cert(vec![certificate.der().clone()], key)
            .map_err(io::Error::other)?;
        // Upgrades exist in HTTP/1.1 only, so the double never offers HTTP/2.
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }

    /// Issues a client certificate for `user`, in `group` if given.
    pub(super) fn issue(&self, user: &str, group: Option<&str>) -> io::Result<ClientCertificate> {
        let mut params = named(user)?;
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let certificate = params
            .signed_by(&key, &self.authority)
            .map_err(io::Error::other)?;
        Ok(ClientCertificate {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            der: certificate.der().to_vec(),
        })
    }
}

fn named(common_name: &str) -> io::Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::new()).map_err(io::Error::other)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    Ok(params)
}
