//! The form of keys: `tg_`, 8 characters of id, `_`, 43 of secret, 6 of CRC-32, all base62. Scanners of repositories find
//! it, and what only looks like it is refused before anything is looked up.

use sha2::{Digest, Sha256};

const PREFIX: &[u8] = b"tg_";
const ID_CHARS: usize = 8;
const SECRET_CHARS: usize = 43;
const SUM_CHARS: usize = 6;
const KEY_CHARS: usize = 3 + ID_CHARS + 1 + SECRET_CHARS + SUM_CHARS;
/// Of `tg_` and the id.
const SHOWN_CHARS: usize = 3 + ID_CHARS;
const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// What a credential looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A key of ours.
    Ours,
    /// The form of one, but its sum is wrong: nobody has it.
    Damaged,
    /// Anything else; it may be in the file.
    Other,
}

/// A key that was just made.
pub struct Minted {
    /// 8 characters, part of the key.
    pub id: String,
    /// The whole key. It is shown once and kept nowhere.
    pub secret: String,
    /// Its SHA-256.
    pub hash: [u8; 32],
}

/// Makes a key, with this id or a new one.
///
/// # Errors
/// When the system has no randomness to give.
pub fn mint(id: Option<&str>) -> Result<Minted, String> {
    let id = match id {
        Some(id) => id.to_owned(),
        None => random(ID_CHARS)?,
    };
    let mut secret = format!("tg_{id}_{}", random(SECRET_CHARS)?);
    secret.push_str(&sum(secret.as_bytes()));
    let hash = Sha256::digest(&secret).into();
    Ok(Minted { id, secret, hash })
}

/// What a credential looks like; says nothing of whether it is known.
pub fn form(credential: &[u8]) -> Form {
    let digits = |part: &[u8]| part.iter().all(u8::is_ascii_alphanumeric);
    let separator = SHOWN_CHARS;
    let fits = credential.len() == KEY_CHARS
        && credential.starts_with(PREFIX)
        && credential[separator] == b'_'
        && digits(&credential[PREFIX.len()..separator])
        && digits(&credential[separator + 1..]);
    if !fits {
        return Form::Other;
    }
    let (key, tail) = credential.split_at(KEY_CHARS - SUM_CHARS);
    if sum(key).as_bytes() == tail { Form::Ours } else { Form::Damaged }
}

/// Base62 characters, each as likely as the others.
fn random(chars: usize) -> Result<String, String> {
    let mut text = String::with_capacity(chars);
    let mut bytes = [0_u8; 64];
    while text.len() < chars {
        getrandom::fill(&mut bytes).map_err(|error| format!("no randomness: {error}"))?;
        // 248 is the last multiple of 62: a remainder of what is above it would favour some.
        let fair = bytes.iter().filter(|&&byte| byte < 248);
        text.extend(fair.take(chars - text.len()).map(|byte| char::from(DIGITS[usize::from(byte % 62)])));
    }
    Ok(text)
}

/// CRC-32 in base62, with leading zeroes.
fn sum(bytes: &[u8]) -> String {
    let mut rest = crc32(bytes);
    let mut digits = [b'0'; SUM_CHARS];
    for digit in digits.iter_mut().rev() {
        *digit = DIGITS[(rest % 62) as usize];
        rest /= 62;
    }
    digits.iter().map(|&digit| char::from(digit)).collect()
}

/// CRC-32 of IEEE 802.3, bit by bit: a key is short.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), |crc, _| step(crc)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_that_of_everybody() {
        assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
        assert_eq!(crc32(b""), 0);
    }

    #[test]
    fn a_key_is_known_by_its_form() {
        let one = mint(None).expect("randomness");
        assert_eq!(form(one.secret.as_bytes()), Form::Ours);
        assert_eq!((one.secret.len(), one.id.len()), (61, 8));
        let again = mint(Some(&one.id)).expect("randomness");
        assert_eq!(again.id, one.id);
        assert_ne!(again.secret, one.secret);
        let mut wrong = one.secret.clone().into_bytes();
        wrong[20] = if wrong[20] == b'a' { b'b' } else { b'a' };
        assert_eq!(form(&wrong), Form::Damaged);
        for other in ["", "tg_", "sk-alice", "tg_12345678_", &one.secret[..60]] {
            assert_eq!(form(other.as_bytes()), Form::Other, "{other}");
        }
    }
}
