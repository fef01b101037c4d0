//! The certificate authority. Its key never leaves the state directory, and its certificate is constrained to the cluster's
//! zone and this machine's own names (RFC 5280 section 4.2.1.10): whoever trusts it trusts it for nothing else.

use std::fs;
use std::io::{self, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CidrSubnet, DnType, GeneralSubtree, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, NameConstraints, date_time_ymd,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tracing::warn;

use crate::name::ClusterDomain;
use crate::tls::Error;

/// The authority's private key and certificate in its folder; the certificate has the name that the documents use.
const KEY: &str = "ca.key";
const CERTIFICATE: &str = "server.crt";

/// A certificate authority for one zone.
#[derive(Debug)]
pub struct CertificateAuthority {
    issuer: Issuer<'static, KeyPair>,
    /// Its own certificate, PEM.
    pem: String,
}

impl CertificateAuthority {
    /// Opens the authority of `folder`, or makes it there. Two programs that do so at the same time end up with the same one.
    ///
    /// # Errors
    /// [`Error::File`], or [`Error::Damaged`] when a file holds something else.
    pub fn open(folder: &Path, zone: &ClusterDomain) -> Result<Self, Error> {
        create_private_folder(folder).map_err(at(folder))?;
        let (key_path, certificate_path) = (folder.join(KEY), folder.join(CERTIFICATE));
        let key = match read(&key_path)? {
            Some(pem) => pem,
            None => keep_first(&key_path, &KeyPair::generate()?.serialize_pem())?,
        };
        let damaged = |error: rcgen::Error| Error::Damaged {
            path: key_path.clone(),
            reason: error.to_string(),
        };
        let key = KeyPair::from_pem(&key).map_err(damaged)?;
        let made = || Ok::<_, Error>(params(zone)?.self_signed(&key)?.pem());
        let pem = match read(&certificate_path)? {
            None => keep_first(&certificate_path, &made()?)?,
            Some(pem) if is_of(&pem, &key) => pem,
            Some(_) => {
                // The key was deleted, so that nothing that it signed is of any use.
                warn!(path = %certificate_path.display(), "the authority's key is another one; its certificate is made anew, trust it again");
                replace(&certificate_path, &made()?)?
            }
        };
        Ok(Self {
            issuer: Issuer::new(params(zone)?, key),
            pem,
        })
    }

    /// Makes an authority that lives in memory only, for a machine whose state directory cannot be written.
    ///
    /// # Errors
    /// [`Error::Issue`].
    pub fn ephemeral(zone: &ClusterDomain) -> Result<Self, Error> {
        let key = KeyPair::generate()?;
        let pem = params(zone)?.self_signed(&key)?.pem();
        Ok(Self {
            issuer: Issuer::new(params(zone)?, key),
            pem,
        })
    }

    /// Returns the authority's certificate, PEM.
    #[must_use]
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Returns where [`open`](Self::open) keeps the certificate, for clients to trust.
    #[must_use]
    pub fn certificate_path(folder: &Path) -> PathBuf {
        folder.join(CERTIFICATE)
    }

    /// Signs a certificate for `key`.
    pub(super) fn sign(&self, params: &CertificateParams, key: &KeyPair) -> Result<Certificate, Error> {
        Ok(params.signed_by(key, &self.issuer)?)
    }
}

/// What the authority's certificate says. It is the same for the same zone, so that the issuer can be rebuilt from the key.
fn params(zone: &ClusterDomain) -> Result<CertificateParams, Error> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name.push(
        DnType::CommonName,
        format!("kube-tunnel local authority for {zone}"),
    );
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    // A trust that a user grants once should not run out by surprise; the key can be deleted at any time.
    params.not_before = date_time_ymd(2025, 1, 1);
    params.not_after = date_time_ymd(2055, 1, 1);
    params.name_constraints = Some(NameConstraints {
        permitted_subtrees: vec![
            GeneralSubtree::DnsName(zone.as_str().into()),
            GeneralSubtree::DnsName("localhost".into()),
            GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(Ipv4Addr::LOCALHOST.into(), 8)),
            GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(Ipv6Addr::LOCALHOST.into(), 128)),
        ],
        excluded_subtrees: Vec::new(),
    });
    Ok(params)
}

fn read(path: &Path) -> Result<Option<String>, Error> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at(path)(error)),
    }
}

/// Says of an error which file it is about.
fn at(path: &Path) -> impl FnOnce(io::Error) -> Error {
    |source| Error::File {
        path: path.into(),
        source,
    }
}

/// Tells whether a certificate is that of a key.
fn is_of(pem: &str, key: &KeyPair) -> bool {
    let public = key.public_key_raw();
    let is_in =
        |certificate: &CertificateDer<'_>| certificate.windows(public.len()).any(|part| part == public);
    CertificateDer::from_pem_slice(pem.as_bytes()).is_ok_and(|certificate| is_in(&certificate))
}

/// Writes `text` in place of what is there, and returns it. The file appears whole.
fn replace(path: &Path, text: &str) -> Result<String, Error> {
    let written = beside(path, text).and_then(|file| Ok(file.persist(path)?));
    written.map_err(at(path))?;
    Ok(text.into())
}

/// Writes a file beside `path`, to take its place; readable by its owner only.
fn beside(path: &Path, text: &str) -> io::Result<tempfile::NamedTempFile> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(text.as_bytes())?;
    file.as_file().sync_all()?;
    Ok(file)
}

/// Writes `text` unless somebody else has written the file meanwhile, and returns what is there. The file appears whole.
fn keep_first(path: &Path, text: &str) -> Result<String, Error> {
    let write = || -> io::Result<bool> {
        match beside(path, text)?.persist_noclobber(path) {
            Ok(_) => Ok(true),
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error.error),
        }
    };
    match write().map_err(at(path))? {
        true => Ok(text.into()),
        false => read(path).map(Option::unwrap_or_default),
    }
}

#[cfg(unix)]
fn create_private_folder(folder: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

#[cfg(not(unix))]
fn create_private_folder(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_authority_is_made_once_and_its_key_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("tls");
        let zone = ClusterDomain::default();
        let first = CertificateAuthority::open(&folder, &zone).unwrap();
        let second = CertificateAuthority::open(&folder, &zone).unwrap();
        assert_eq!(first.pem(), second.pem());
        let exported = fs::read_to_string(CertificateAuthority::certificate_path(&folder)).unwrap();
        assert_eq!(exported, first.pem());
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
            assert_eq!((mode(&folder.join(KEY)), mode(&folder)), (0o600, 0o700));
        }
    }

    #[test]
    fn a_new_key_gets_a_certificate_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let zone = ClusterDomain::default();
        let first = CertificateAuthority::open(folder.path(), &zone).unwrap();
        fs::remove_file(folder.path().join(KEY)).unwrap();
        let second = CertificateAuthority::open(folder.path(), &zone).unwrap();
        assert_ne!(first.pem(), second.pem());
        assert!(is_of(second.pem(), second.issuer.key()));
        let exported = fs::read_to_string(CertificateAuthority::certificate_path(folder.path())).unwrap();
        assert_eq!(exported, second.pem());
    }

    #[test]
    fn a_damaged_key_is_named() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(KEY), "no key").unwrap();
        let error = CertificateAuthority::open(folder.path(), &ClusterDomain::default()).unwrap_err();
        assert!(error.to_string().contains("ca.key cannot be used"), "{error}");
    }
}
