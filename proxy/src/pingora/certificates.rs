//! The certificate that a TLS listener shows, and its change while connections go on.

use crate::config::Tls;
use arc_swap::ArcSwapOption;
use pingora_core::tls::sign::CertifiedKey;
use pingora_core::tls::{
    ClientHello, CryptoProvider, ResolvesServerCert, install_default_crypto_provider,
    load_certs_and_key_files,
};
use std::fmt;
use std::sync::Arc;

/// What handshakes are answered with from now on. Connections that are there keep what they have.
#[derive(Default)]
pub(crate) struct Certificates {
    current: ArcSwapOption<CertifiedKey>,
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Certificates") // and no key
    }
}

impl Certificates {
    /// Reads the files again.
    ///
    /// # Errors
    /// Why they cannot be used; the certificate then stays as it was.
    pub(crate) fn read(&self, tls: &Tls) -> Result<(), String> {
        let (certificate, key) = (tls.certificate.to_string_lossy(), tls.key.to_string_lossy());
        let (chain, key) = load_certs_and_key_files(&certificate, &key)
            .map_err(|error| error.to_string())?
            .ok_or("the files hold no certificate with a key")?;
        install_default_crypto_provider();
        let provider = CryptoProvider::get_default().ok_or("there is no cryptography")?;
        let pair = CertifiedKey::from_der(chain, key, provider).map_err(|e| e.to_string())?;
        self.current.store(Some(Arc::new(pair)));
        Ok(())
    }
}

/// A [`ResolvesServerCert`] over shared [`Certificates`].
#[derive(Debug)]
pub(super) struct Shown(pub(super) Arc<Certificates>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.current.load_full()
    }
}
