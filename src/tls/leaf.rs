//! One certificate for each name that a client asks for (SNI), made on first use and kept for a while.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose};
use rustls::crypto::aws_lc_rs::sign::any_ecdsa_type;
use rustls::pki_types::PrivateKeyDer;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::{CertifiedKey, SigningKey};

use crate::tls::{CertificateAuthority, Error};

/// How long a certificate is good for. Short, because a new one costs nothing; Apple's limit is 825 days.
const VALIDITY: Duration = Duration::from_hours(24 * 30);

/// How long a certificate is in use: clients must never see one that is about to run out.
const IN_USE: Duration = Duration::from_hours(24 * 15);

/// Clocks of containers and laptops differ; a certificate must not be from their future.
const CLOCK_SKEW: Duration = Duration::from_hours(24);

/// Certificates kept; a client that asks for ever new names only makes us sign them again.
const KEPT: usize = 1024;

/// Makes and keeps the certificates of the names that clients ask for.
pub struct Leaves {
    authority: CertificateAuthority,
    /// One key for all: a certificate then costs one signature.
    key: KeyPair,
    signing: Arc<dyn SigningKey>,
    /// By name, with the time at which they were made; the empty name is this machine. By the clock that clients judge them by:
    /// another one may stand still while the machine sleeps.
    kept: Mutex<BTreeMap<String, (Arc<CertifiedKey>, SystemTime)>>,
}

impl fmt::Debug for Leaves {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leaves")
            .field("authority", &self.authority)
            .finish_non_exhaustive()
    }
}

impl Leaves {
    /// Makes an empty store of certificates of `authority`.
    ///
    /// # Errors
    /// [`Error::Issue`] or [`Error::Library`] when no key can be made.
    pub fn new(authority: CertificateAuthority) -> Result<Self, Error> {
        let key = KeyPair::generate()?;
        let der = PrivateKeyDer::try_from(key.serialize_der())
            .map_err(|error| rustls::Error::General(error.into()))?;
        let signing = any_ecdsa_type(&der)?;
        Ok(Self {
            authority,
            key,
            signing,
            kept: Mutex::default(),
        })
    }

    /// Returns the certificate for a server name; without one, that of this machine.
    fn certificate(&self, name: &str, now: SystemTime) -> Result<Arc<CertifiedKey>, Error> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((certificate, made)) = kept.get(name)
            && now.duration_since(*made).is_ok_and(|age| age < IN_USE)
        {
            return Ok(certificate.clone());
        }
        let certificate = Arc::new(self.issue(name, now)?);
        if kept.len() >= KEPT {
            let oldest = kept
                .iter()
                .min_by_key(|(_, (_, made))| *made)
                .map(|(name, _)| name.clone());
            oldest.and_then(|name| kept.remove(&name));
        }
        kept.insert(name.to_owned(), (certificate.clone(), now));
        Ok(certificate)
    }

    fn issue(&self, name: &str, now: SystemTime) -> Result<CertifiedKey, Error> {
        let names = match name {
            "" | "localhost" => ["localhost", "127.0.0.1", "::1"].map(str::to_owned).into(),
            name => vec![name.to_owned()],
        };
        let mut params = CertificateParams::new(names)?;
        // The subject alternative names count; a common name is limited to 64 characters and is for people.
        params.distinguished_name.push(DnType::CommonName, "kube-tunnel");
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        params.not_before = (now - CLOCK_SKEW).into();
        params.not_after = (now + VALIDITY).into();
        let certificate = self.authority.sign(&params, &self.key)?;
        Ok(CertifiedKey::new(
            vec![certificate.der().clone()],
            self.signing.clone(),
        ))
    }
}

impl ResolvesServerCert for Leaves {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().unwrap_or_default().to_ascii_lowercase();
        match self.certificate(&name, SystemTime::now()) {
            Ok(certificate) => Some(certificate),
            Err(error) => {
                tracing::debug!(%error, name, "no certificate for this name");
                None // rustls answers with an alert
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::ClusterDomain;

    #[test]
    fn a_certificate_is_in_use_until_clients_could_see_it_run_out() {
        let authority = CertificateAuthority::ephemeral(&ClusterDomain::default()).unwrap();
        let (leaves, now) = (Leaves::new(authority).unwrap(), SystemTime::now());
        let first = leaves.certificate("web.shop", now).unwrap();
        let is_first = |now| Arc::ptr_eq(&leaves.certificate("web.shop", now).unwrap(), &first);
        assert!(is_first(now + IN_USE - Duration::from_secs(1)));
        assert!(!is_first(now + IN_USE));
        let second = leaves.certificate("web.shop", now + IN_USE).unwrap();
        let earlier = leaves.certificate("web.shop", now).unwrap();
        assert!(!Arc::ptr_eq(&second, &earlier), "it may be from the future");
    }
}
