//! Certificates for trying out the example. They stand for those of a real authority.

use std::{error::Error, fs, path::Path};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair,
};

pub(crate) type Authority = CertifiedIssuer<'static, KeyPair>;

/// Makes an authority and a client certificate, and writes the files that clients need.
pub(crate) fn authority(folder: &Path) -> Result<Authority, Box<dyn Error + Send + Sync>> {
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, "authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    fs::write(folder.join("ca.pem"), authority.pem())?;

    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "ada");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate()?;
    let client = params.signed_by(&key, &authority)?;
    let both = client.pem() + &key.serialize_pem();
    fs::write(folder.join("client.pem"), both)?;
    Ok(authority)
}

/// Writes a new certificate and its key. Stands for the program that renews the certificate.
pub(crate) fn renew(
    authority: &Authority,
    folder: &Path,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let key = KeyPair::generate()?;
    let names = ["localhost".into(), "127.0.0.1".into()];
    let certificate = CertificateParams::new(names)?.signed_by(&key, authority)?;
    let both = certificate.pem() + &key.serialize_pem();
    fs::write(folder.join("server.pem"), both)?;
    Ok(())
}
