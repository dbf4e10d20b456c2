//! The authority's private key on disk: PKCS#8, encrypted by PBES2 (PBKDF2-HMAC-SHA256, AES-256-CBC), so that `openssl
//! pkcs8` reads it too; and the file of its passphrase, which lies elsewhere. Who has one of the two has nothing.

use std::io::Read;
use std::path::{Path, PathBuf};

use pkcs8::der::pem::PemLabel;
use pkcs8::pkcs5::EncryptionScheme;
use pkcs8::pkcs5::pbes2::Parameters;
use pkcs8::{EncryptedPrivateKeyInfo, LineEnding, SecretDocument};
use rand::Rng;
use rcgen::KeyPair;

use super::{CaError, read, write_private};

/// Where the passphrase is when the command line does not say: not in the data directory, nor in the tree it usually is
/// in, for those are backed up together with the key.
pub const DEFAULT_PASSPHRASE_FILE: &str = "/etc/sluice/ca-passphrase";
/// Rounds of PBKDF2: OWASP's least for SHA-256. About 0.2 s at each start.
const ROUNDS: u32 = 600_000;
/// A key that asks for more is refused: its file would decide how long a start takes.
const MAX_ROUNDS: u32 = 10_000_000;
/// Longest passphrase file; a longer one is most likely another file.
const MAX_PASSPHRASE_BYTES: u64 = 4_096;

/// Where the passphrase is.
#[derive(Debug, Clone)]
pub struct PassphraseFile {
    /// The file; its first line counts, as for openssl.
    pub path: PathBuf,
    /// Make one of 256 random bits where none is, unless a key has been encrypted already.
    pub make: bool,
}

impl PassphraseFile {
    /// The operator's: it must be there.
    pub fn given(path: PathBuf) -> Self {
        PassphraseFile { path, make: false }
    }
}

impl Default for PassphraseFile {
    fn default() -> Self {
        PassphraseFile { path: DEFAULT_PASSPHRASE_FILE.into(), make: true }
    }
}

/// A new key, written to `path`.
pub(super) fn create(path: &Path, file: &PassphraseFile) -> Result<KeyPair, CaError> {
    let key = KeyPair::generate().map_err(|e| malformed(e.to_string()))?;
    store(path, &key, file)?;
    Ok(key)
}

/// The key at `path`. One in plain is replaced by its encrypted form, whole or not at all.
pub(super) fn load(path: &Path, file: &PassphraseFile) -> Result<KeyPair, CaError> {
    let pem = read(path)?;
    if pem.contains(EncryptedPrivateKeyInfo::PEM_LABEL) {
        return decrypt(path, &pem, file);
    }
    let key = KeyPair::from_pem(&pem).map_err(|e| malformed(e.to_string()))?;
    store(path, &key, file)?;
    tracing::info!(key = %path.display(), "the authority's key lay there in plain and is encrypted now");
    Ok(key)
}

fn store(path: &Path, key: &KeyPair, file: &PassphraseFile) -> Result<(), CaError> {
    let passphrase = if file.make && !file.path.exists() { make(path, file)? } else { passphrase(path, file)? };
    // Before the key is written, so that none ever lies there whose passphrase is lost to a crash.
    write_private(path, &encrypt(&key.serialize_der(), &passphrase).map_err(malformed)?)
}

/// The passphrase in the file.
fn passphrase(key: &Path, file: &PassphraseFile) -> Result<String, CaError> {
    let failed = |cause: String| CaError::Passphrase { key: key.to_owned(), path: file.path.clone(), cause };
    let remedy = "restore the file, or say with --ca-passphrase-file where it is; without it the key is lost, and nodes \
                  must join a new authority (docs/control.md)";
    let unreadable = |e: std::io::Error| failed(format!("{e}; {remedy}"));
    let mut text = String::new();
    let opened = std::fs::File::open(&file.path).map_err(unreadable)?;
    opened.take(MAX_PASSPHRASE_BYTES + 1).read_to_string(&mut text).map_err(unreadable)?;
    match text.lines().next() {
        Some(line) if !line.is_empty() && text.len() as u64 <= MAX_PASSPHRASE_BYTES => Ok(line.to_owned()),
        _ => {
            Err(failed(format!("its first line is empty, or it is longer than {MAX_PASSPHRASE_BYTES} bytes; {remedy}")))
        }
    }
}

fn make(key: &Path, file: &PassphraseFile) -> Result<String, CaError> {
    let failed = |source: std::io::Error| CaError::Passphrase {
        key: key.to_owned(),
        path: file.path.clone(),
        cause: format!("none is there, and none can be made: {source}; give one with --ca-passphrase-file"),
    };
    let passphrase: String = rand::rng().random::<[u8; 32]>().iter().map(|byte| format!("{byte:02x}")).collect();
    if let Some(folder) = file.path.parent() {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    match write_private(&file.path, &format!("{passphrase}\n")) {
        Err(CaError::File { source, .. }) => Err(failed(source)),
        other => other,
    }?;
    tracing::warn!(
        passphrase = %file.path.display(), key = %key.display(),
        "made a passphrase for the authority's key; keep both, apart from each other: one is worth nothing without the other"
    );
    Ok(passphrase)
}

fn encrypt(der: &[u8], passphrase: &str) -> Result<String, String> {
    let (salt, iv): ([u8; 16], [u8; 16]) = (rand::rng().random(), rand::rng().random());
    let parameters = Parameters::pbkdf2_sha256_aes256cbc(ROUNDS, &salt, &iv).map_err(|e| e.to_string())?;
    let encrypted_data = parameters.encrypt(passphrase, der).map_err(|e| e.to_string())?;
    let info = EncryptedPrivateKeyInfo { encryption_algorithm: parameters.into(), encrypted_data: &encrypted_data };
    let document = SecretDocument::try_from(&info).map_err(|e| e.to_string())?;
    let pem = document.to_pem(EncryptedPrivateKeyInfo::PEM_LABEL, LineEnding::LF).map_err(|e| e.to_string())?;
    Ok(pem.to_string())
}

fn decrypt(path: &Path, pem: &str, file: &PassphraseFile) -> Result<KeyPair, CaError> {
    let passphrase = passphrase(path, file)?;
    let (_, document) = SecretDocument::from_pem(pem).map_err(|e| malformed(e.to_string()))?;
    let info = EncryptedPrivateKeyInfo::try_from(document.as_bytes()).map_err(|e| malformed(e.to_string()))?;
    if !affordable(&info.encryption_algorithm) {
        let cause = format!("it is not encrypted by PBES2 with PBKDF2 of at most {MAX_ROUNDS} rounds");
        return Err(malformed(cause));
    }
    // A wrong passphrase shows as wrong padding or, one time in 256, as bytes that are no key.
    let wrong = || CaError::WrongPassphrase { key: path.to_owned(), path: file.path.clone() };
    let key = info.decrypt(passphrase).map_err(|_| wrong())?;
    KeyPair::try_from(key.as_bytes()).map_err(|_| wrong())
}

fn affordable(scheme: &EncryptionScheme<'_>) -> bool {
    let rounds = scheme.pbes2().and_then(|pbes2| pbes2.kdf.pbkdf2()).map(|kdf| kdf.iteration_count);
    rounds.is_some_and(|rounds| rounds <= MAX_ROUNDS)
}

fn malformed(cause: String) -> CaError {
    CaError::Malformed { what: "ca.key", cause }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::Authority;
    use std::fs;

    /// A data directory, and a passphrase file outside of it.
    struct Place {
        folder: tempfile::TempDir,
    }

    impl Place {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            fs::create_dir(folder.path().join("data")).expect("a folder");
            Place { folder }
        }

        fn data(&self) -> PathBuf {
            self.folder.path().join("data")
        }

        fn key(&self) -> String {
            fs::read_to_string(self.data().join("ca.key")).expect("a key")
        }

        fn file(&self, make: bool) -> PassphraseFile {
            PassphraseFile { path: self.folder.path().join("etc/ca-passphrase"), make }
        }

        fn start(&self, make: bool) -> Result<String, String> {
            let authority = Authority::load_or_create(&self.data(), &self.file(make)).map_err(|e| e.to_string())?;
            Ok(authority.bundle_pem().to_owned())
        }
    }

    #[test]
    fn the_key_is_encrypted_and_a_restart_finds_it() {
        let place = Place::new();
        let first = place.start(true).expect("starts");
        let pem = place.key();
        assert!(pem.starts_with("-----BEGIN ENCRYPTED PRIVATE KEY-----"), "{pem}");
        let plain = load(&place.data().join("ca.key"), &place.file(false)).expect("decrypts").serialize_der();
        let (_, stored) = SecretDocument::from_pem(&pem).expect("PEM");
        // The scalar is the part that is secret: 32 bytes behind the fixed head of a P-256 key.
        assert!(!stored.as_bytes().windows(16).any(|window| plain.windows(16).any(|secret| secret == window)));
        let written = fs::metadata(place.data().join("ca.key")).expect("a file");
        assert_eq!(std::os::unix::fs::PermissionsExt::mode(&written.permissions()) & 0o777, 0o600);
        assert_eq!(place.start(true).expect("starts again"), first);
        assert_eq!(place.start(false).expect("starts with the file given"), first);
        assert_eq!(place.key(), pem, "a start changes nothing");
    }

    #[test]
    fn a_wrong_or_missing_passphrase_changes_nothing_and_is_named() {
        let place = Place::new();
        place.start(true).expect("starts");
        let (pem, file) = (place.key(), place.file(true).path);
        let right = fs::read_to_string(&file).expect("made");
        for wrong in ["another\n", "", &"x".repeat(5_000)] {
            fs::write(&file, wrong).expect("writes");
            let error = place.start(true).expect_err("refused");
            for part in ["ca.key", file.to_str().expect("text"), "--ca-passphrase-file"] {
                assert!(error.contains(part), "{error}");
            }
            assert_eq!(fs::read_to_string(&file).expect("there"), wrong);
        }
        fs::remove_file(&file).expect("removes");
        for make in [true, false] {
            let error = place.start(make).expect_err("refused");
            assert!(error.contains(file.to_str().expect("text")) && error.contains("restore"), "{error}");
            assert!(!file.exists(), "a new one would not fit the key");
        }
        assert_eq!(place.key(), pem);
        fs::write(&file, right).expect("writes");
        place.start(false).expect("starts with the right one");
    }

    #[test]
    fn a_plain_key_is_encrypted_at_the_next_start() {
        let place = Place::new();
        let bundle = place.start(true).expect("starts");
        let key_path = place.data().join("ca.key");
        let plain = load(&key_path, &place.file(false)).expect("decrypts").serialize_pem();
        fs::write(&key_path, &plain).expect("writes");
        // Where no passphrase can be had, the plain key stays as it is.
        fs::remove_file(place.file(true).path).expect("removes");
        place.start(false).expect_err("no passphrase");
        assert_eq!(place.key(), plain);
        assert_eq!(place.start(true).expect("starts"), bundle);
        assert!(place.key().contains("ENCRYPTED"));
        let again = load(&key_path, &place.file(false)).expect("decrypts").serialize_pem();
        assert_eq!(again, plain, "it is the same key");
    }

    #[test]
    fn a_crash_between_key_and_certificate_is_made_good() {
        let place = Place::new();
        place.start(true).expect("starts");
        let pem = place.key();
        fs::remove_file(place.data().join("ca.crt")).expect("removes");
        place.start(true).expect("makes a certificate for the key");
        assert_eq!(place.key(), pem);
        fs::remove_file(place.data().join("ca.key")).expect("removes");
        let error = place.start(true).expect_err("a certificate without its key");
        assert!(error.contains("ca.key"), "{error}");
    }

    #[test]
    fn what_a_file_may_ask_for_is_bounded() {
        let (salt, iv) = ([0; 16], [0; 16]);
        let rounds = |n| Parameters::pbkdf2_sha256_aes256cbc(n, &salt, &iv).expect("parameters");
        assert!(affordable(&rounds(MAX_ROUNDS).into()));
        assert!(!affordable(&rounds(MAX_ROUNDS + 1).into()));
        let scrypt = Parameters::scrypt_aes256cbc(pkcs8::pkcs5::scrypt::Params::recommended(), &salt, &iv);
        assert!(!affordable(&scrypt.expect("parameters").into()));
        for garbage in [
            "",
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\n",
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
        ] {
            let place = Place::new();
            place.start(true).expect("starts");
            fs::write(place.data().join("ca.key"), garbage).expect("writes");
            place.start(true).expect_err(garbage);
            assert_eq!(place.key(), garbage);
        }
    }
}
