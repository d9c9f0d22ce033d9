//! Classes of bytes, and runs of them.

/// The class of `tchar` (RFC 9110, section 5.6.2).
pub(super) const TOKEN: u8 = 1;
/// The class of what a request target may hold.
pub(super) const TARGET: u8 = 2;

/// Which classes a byte is in: `tchar` of RFC 9110, or what a request target may hold: visible ASCII but `#` (a
/// fragment is never sent) and what the `http` crate refuses in a path.
static CLASSES: [u8; 256] = {
    let mut classes = [0; 256];
    let mut byte = 0x21;
    while byte < 0x7f {
        let c = byte as u8;
        if c.is_ascii_alphanumeric()
            || matches!(c, b'!' | b'$'..=b'\'' | b'*' | b'+' | b'-' | b'.' | b'^'..=b'`')
            || matches!(c, b'#' | b'|' | b'~')
        {
            classes[byte] |= TOKEN;
        }
        if !matches!(c, b'"' | b'#' | b'<' | b'>' | b'`') {
            classes[byte] |= TARGET;
        }
        byte += 1;
    }
    classes
};

/// Whether a byte is in a class.
pub(super) fn is(byte: u8, class: u8) -> bool {
    CLASSES[usize::from(byte)] & class != 0
}

/// How many bytes of a class come first.
pub(super) fn run(bytes: &[u8], class: u8) -> usize {
    bytes.iter().position(|&byte| !is(byte, class)).unwrap_or(bytes.len())
}

/// How many bytes come before the first control character other than HTAB.
pub(super) fn text_run(bytes: &[u8]) -> usize {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    let mut at = 0;
    // Eight bytes at a time: the top bit of a byte of `control` is set if it is below 0x20 or is 0x7f. A borrow
    // can set it wrongly, but only above a byte that is one; the lowest is exact.
    while let Some(word) = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>()) {
        let word = u64::from_le_bytes(*word);
        let delete = word ^ (ONES * 0x7f);
        let below = word.wrapping_sub(ONES * 0x20) & !word;
        let control = (below | (delete.wrapping_sub(ONES) & !delete)) & (ONES * 0x80);
        if control == 0 {
            at += 8;
            continue;
        }
        at += control.trailing_zeros() as usize / 8;
        if bytes[at] != b'\t' {
            return at;
        }
        at += 1;
    }
    let rest = bytes[at..].iter().position(|&byte| byte.is_ascii_control() && byte != b'\t');
    rest.map_or(bytes.len(), |rest| at + rest)
}
