//! Changes bytes the way that formats break: cut, doubled, with other bits, with numbers at the edges of their range.

/// xorshift64*: small, seeded, and the same everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n`; 0 if that is 0.
    pub fn below(&mut self, n: usize) -> usize {
        if n == 0 { 0 } else { (self.next() % n as u64) as usize }
    }

    pub fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

const EDGES: [i64; 20] = [
    0,
    1,
    -1,
    2,
    7,
    8,
    63,
    64,
    127,
    128,
    255,
    256,
    i16::MAX as i64,
    i16::MIN as i64,
    i32::MAX as i64,
    i32::MIN as i64,
    u32::MAX as i64,
    i64::MAX,
    i64::MIN,
    1 << 40,
];

/// One to five changes of `bytes`; `others` are files of the same format, to take pieces from.
pub fn mutate(random: &mut Random, bytes: &mut Vec<u8>, others: &[Vec<u8>], text: bool) {
    for _ in 0..1 + random.below(5) {
        if text && random.below(2) == 0 {
            mutate_number(random, bytes);
        } else {
            mutate_once(random, bytes, others);
        }
    }
}

fn range(random: &mut Random, len: usize) -> std::ops::Range<usize> {
    let start = random.below(len + 1);
    let longest = if random.below(4) == 0 { len - start } else { (len - start).min(64) };
    start..start + random.below(longest + 1)
}

fn mutate_once(random: &mut Random, bytes: &mut Vec<u8>, others: &[Vec<u8>]) {
    let len = bytes.len();
    if len == 0 {
        let other: &Vec<u8> = random.pick(others);
        bytes.extend_from_slice(other);
        return;
    }
    // What formats say about themselves is at their ends.
    let at = match random.below(3) {
        0 => random.below(len.min(256)),
        1 => len - 1 - random.below(len.min(512)),
        _ => random.below(len),
    };
    match random.below(10) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = random.next() as u8,
        2 | 3 => {
            let width = *random.pick(&[1, 2, 4, 8]);
            let value = random.pick(&EDGES).wrapping_add(random.below(3) as i64 - 1).to_le_bytes();
            let start = if random.below(2) == 0 { at } else { at & !(width - 1) };
            for (to, from) in bytes.iter_mut().skip(start).zip(&value[..width]) {
                *to = *from;
            }
        }
        4 => {
            let value = bytes[at].wrapping_add(random.below(9) as u8).wrapping_sub(4);
            bytes[at] = value;
        }
        5 => drop(bytes.drain(range(random, len))),
        6 => {
            let piece = bytes[range(random, len)].to_vec();
            bytes.splice(at..at, piece);
        }
        7 => bytes.truncate(at),
        8 => {
            let piece = range(random, len);
            let fill = if random.below(2) == 0 { 0 } else { random.next() as u8 };
            bytes[piece].fill(fill);
        }
        _ => {
            let other = random.pick(others);
            let piece = other[range(random, other.len())].to_vec();
            let end = (at + piece.len()).min(len);
            bytes.splice(at..end, piece);
        }
    }
}

/// Puts another value in place of a number, or of a quoted text, of JSON.
fn mutate_number(random: &mut Random, bytes: &mut Vec<u8>) {
    let starts: Vec<usize> =
        (1..bytes.len()).filter(|&i| bytes[i].is_ascii_digit() && !bytes[i - 1].is_ascii_digit()).collect();
    if starts.is_empty() {
        return;
    }
    let start = *random.pick(&starts);
    let end = (start..bytes.len()).find(|&i| !bytes[i].is_ascii_digit()).unwrap_or(bytes.len());
    let value = match random.below(6) {
        0 => "null".to_owned(),
        1 => "1e400".to_owned(),
        2 => "18446744073709551615".to_owned(),
        3 => "[]".to_owned(),
        _ => random.pick(&EDGES).to_string(),
    };
    bytes.splice(start..end, value.into_bytes());
}
