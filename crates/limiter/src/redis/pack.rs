//! As much of MessagePack as the scripts need: whole numbers, text and lists.
//! <https://github.com/msgpack/msgpack/blob/master/spec.md>

/// Writes one value after the other.
#[derive(Default)]
pub(super) struct Packer(pub(super) Vec<u8>);

impl Packer {
    /// The head of a list; its `length` items follow.
    pub(super) fn list(&mut self, length: usize) {
        match u16::try_from(length) {
            Ok(short @ 0..=15) => self.0.push(0x90 | short as u8),
            Ok(medium) => {
                self.0.push(0xdc);
                self.0.extend(medium.to_be_bytes());
            }
            Err(_) => {
                self.0.push(0xdd);
                self.0.extend((length as u32).to_be_bytes());
            }
        }
    }

    pub(super) fn text(&mut self, text: &str) {
        self.0.push(0xdb);
        self.0.extend((text.len() as u32).to_be_bytes());
        self.0.extend(text.as_bytes());
    }

    pub(super) fn number(&mut self, number: u64) {
        match number {
            0..=0x7f => self.0.push(number as u8),
            0x80..=0xffff_ffff => {
                self.0.push(0xce);
                self.0.extend((number as u32).to_be_bytes());
            }
            _ => {
                self.0.push(0xcf);
                self.0.extend(number.to_be_bytes());
            }
        }
    }
}

/// Reads a list of whole numbers from 0. `None`: it is none, or something follows.
pub(super) fn numbers(packed: &[u8]) -> Option<Vec<u64>> {
    let mut rest = packed;
    let length = match first(&mut rest)? {
        head @ 0x90..=0x9f => usize::from(head & 0x0f),
        0xdc => usize::try_from(big_endian(&mut rest, 2)?).ok()?,
        0xdd => usize::try_from(big_endian(&mut rest, 4)?).ok()?,
        _ => return None,
    };
    // No number is shorter than a byte: a length that lies asks for no memory.
    let mut numbers = Vec::with_capacity(length.min(rest.len()));
    for _ in 0..length {
        numbers.push(match first(&mut rest)? {
            small @ 0..=0x7f => u64::from(small),
            0xcc | 0xd0 => big_endian(&mut rest, 1)?,
            0xcd | 0xd1 => big_endian(&mut rest, 2)?,
            0xce | 0xd2 => big_endian(&mut rest, 4)?,
            0xcf | 0xd3 => big_endian(&mut rest, 8)?,
            _ => return None,
        });
    }
    rest.is_empty().then_some(numbers)
}

fn first(rest: &mut &[u8]) -> Option<u8> {
    let (first, after) = rest.split_first()?;
    *rest = after;
    Some(*first)
}

fn big_endian(rest: &mut &[u8], bytes: usize) -> Option<u64> {
    let (number, after) = rest.split_at_checked(bytes)?;
    *rest = after;
    Some(number.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::{Packer, numbers};

    #[test]
    fn numbers_come_back() {
        let all: Vec<u64> = (0..64).flat_map(|bit| [(1 << bit) - 1, 1 << bit]).collect();
        for length in [0, 1, 15, 16, 128] {
            let mut packer = Packer::default();
            packer.list(length);
            all[..length].iter().for_each(|number| packer.number(*number));
            assert_eq!(numbers(&packer.0).as_deref(), Some(&all[..length]));
            for cut in 0..packer.0.len() {
                assert_eq!(numbers(&packer.0[..cut]), None);
            }
            packer.number(1);
            assert_eq!(numbers(&packer.0), None, "something follows");
        }
        assert_eq!(numbers(&[0xdd, 0xff, 0xff, 0xff, 0xff, 1]), None, "a length that lies");
        assert_eq!(numbers(b"hello"), None);
    }
}
