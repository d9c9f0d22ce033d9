//! Encryption: whom a connection believes, and as whom it shows itself.

use std::fmt;
use std::sync::Arc;

use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto};

/// What `rediss://` needs beyond the certificates that the system trusts. All of it is PEM.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Tls {
    /// Certificates that sign those of the servers, instead of the system's.
    pub ca: Option<Vec<u8>>,
    /// The client's own certificate, and those that lead to a trusted one.
    pub cert: Option<Vec<u8>>,
    /// The key of `cert`: PKCS #8, PKCS #1 or SEC 1.
    pub key: Option<Vec<u8>>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let given = |part: &Option<Vec<u8>>| part.is_some();
        let (ca, cert, key) = (given(&self.ca), given(&self.cert), given(&self.key));
        f.debug_struct("Tls").field("ca", &ca).field("cert", &cert).field("key", &key).finish()
    }
}

impl Tls {
    /// Names are always checked: there is no way to turn that off.
    pub(super) fn connector(&self) -> Result<TlsConnector, String> {
        let mut roots = RootCertStore::empty();
        match &self.ca {
            Some(ca) => {
                for certificate in certificates("ca", ca)? {
                    let added = roots.add(certificate);
                    added.map_err(|error| format!("ca: a certificate cannot be trusted: {error}"))?;
                }
            }
            None => {
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                if roots.is_empty() {
                    roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
                }
            }
        }
        let provider = Arc::new(crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let builder = builder.map_err(|error| error.to_string())?.with_root_certificates(roots);
        let config = match (&self.cert, &self.key) {
            (None, None) => builder.with_no_client_auth(),
            (Some(cert), Some(key)) => {
                let key = PrivateKeyDer::from_pem_slice(key)
                    .map_err(|error| format!("key: this is no private key in PEM: {error}"))?;
                let config = builder.with_client_auth_cert(certificates("cert", cert)?, key);
                config.map_err(|error| format!("cert and key do not fit: {error}"))?
            }
            (Some(_), None) => return Err("a cert needs its key".into()),
            (None, Some(_)) => return Err("a key needs its cert".into()),
        };
        Ok(TlsConnector::from(Arc::new(config)))
    }
}

fn certificates(what: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let read = read.map_err(|error| format!("{what}: this is no certificate in PEM: {error}"))?;
    if read.is_empty() {
        return Err(format!("{what}: there is no certificate in it"));
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::Tls;

    #[test]
    fn what_cannot_be_used_is_told_at_once() {
        let refused = |tls: Tls| tls.connector().err().expect("it is refused");
        let some = |text: &str| Some(text.as_bytes().to_vec());
        let (ca, cert, key) = (some("nonsense"), some("nonsense"), some("nonsense"));
        assert!(refused(Tls { ca, ..Tls::default() }).starts_with("ca: "));
        assert_eq!(refused(Tls { cert, ..Tls::default() }), "a cert needs its key");
        assert_eq!(refused(Tls { key: key.clone(), ..Tls::default() }), "a key needs its cert");
        let cert = some("nonsense");
        assert!(refused(Tls { cert, key: key.clone(), ..Tls::default() }).starts_with("key: "));
        assert_eq!(
            format!("{:?}", Tls { key, ..Tls::default() }),
            "Tls { ca: false, cert: false, key: true }"
        );
    }
}
