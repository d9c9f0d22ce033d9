//! PEM files that the configuration names: looked at when it is read, so that a wrong one is found then.

use std::io::Read;
use std::path::Path;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::scalar::{Fault, fault};

/// Bytes of a PEM file: more than every public authority together.
const PEM_BYTES_MAX: u64 = 4 << 20;

/// Whether a file holds at least one certificate, and no broken one.
pub(super) fn certificates(path: &Path) -> Result<(), Fault> {
    let bytes = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(()),
        Ok(_) => fault("holds no certificate", "it is PEM: it has lines `-----BEGIN CERTIFICATE-----`"),
        Err(error) => fault(format!("is no PEM: {error}"), ""),
    }
}

/// Whether a file holds a private key.
pub(super) fn private_key(path: &Path) -> Result<(), Fault> {
    // What is wrong with it is not said: it may be a line of the key.
    let help = "it is PEM: it has a line `-----BEGIN PRIVATE KEY-----`";
    PrivateKeyDer::from_pem_slice(&read(path)?).map(drop).or_else(|_| fault("holds no private key", help))
}

/// A whole file. Only files: a pipe would be waited for, and a device never ends.
fn read(path: &Path) -> Result<Vec<u8>, Fault> {
    let unreadable =
        |error: std::io::Error| Fault { what: format!("cannot be read: {error}"), help: String::new() };
    if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
        return fault("is not a file", "");
    }
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(PEM_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    match bytes.len() as u64 > PEM_BYTES_MAX {
        true => fault("is too large", format!("at most {PEM_BYTES_MAX} bytes")),
        false => Ok(bytes),
    }
}
