//! Makes almost valid inputs: splits a seed into words and changes a few of them.
//!
//! `cargo fuzz` is guided by coverage. This mutator is random, but it knows the syntax of the inputs: it splits JSON at
//! strings, numbers and brackets, so that most inputs get past the parser.

use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::ops::Range;

/// Words that often break programs.
const WORDS: [&str; 40] = [
    "0",
    "-0",
    "1",
    "-1",
    "2",
    "8",
    "127",
    "255",
    "256",
    "65535",
    "65536",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "9007199254740993",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e308",
    "1e309",
    "-1e309",
    "1e-320",
    "0.5",
    "NaN",
    "Infinity",
    "null",
    "true",
    "false",
    "\"\"",
    "{}",
    "[]",
    "{",
    "}",
    "[",
    "]",
    "\"..\"",
    "\"/\"",
    "\"\\u0000\\n\\u001b[2J\"",
];
/// Longest input.
const INPUT_BYTES_MAX: usize = 1 << 18;
/// Largest number of interesting inputs that are kept beside the seeds.
const KEPT_MAX: usize = 2000;
/// Largest number of copies of a word in a row.
const COPIES_LOG_MAX: u32 = 14;

/// Makes inputs from seeds.
pub struct Mutator {
    chance: ChaCha8Rng,
    pool: Vec<Vec<u8>>,
    seeds: usize,
    words: Vec<Vec<u8>>,
}

impl Mutator {
    /// A mutator of these seeds; the same number gives the same inputs.
    pub fn new(seeds: Vec<Vec<u8>>, number: u64) -> Self {
        let own = WORDS.iter().map(|word| word.as_bytes().to_vec());
        let mut words: Vec<Vec<u8>> = seeds.iter().flat_map(|seed| parts(seed)).collect();
        words.sort_unstable();
        words.dedup();
        // As often as words of the seeds, however many these are.
        let own: Vec<Vec<u8>> = own.collect();
        let times = words.len() / own.len() + 1;
        words.extend(std::iter::repeat_n(own, times).flatten());
        let pool = if seeds.is_empty() { vec![Vec::new()] } else { seeds };
        Self { chance: ChaCha8Rng::seed_from_u64(number), seeds: pool.len(), pool, words }
    }

    /// The next input.
    pub fn input(&mut self) -> Vec<u8> {
        let base = self.pool.choose(&mut self.chance).expect("never empty").clone();
        let mut input = parts(&base);
        for _ in 0..1 << self.chance.random_range(0..4_u32) {
            self.change(&mut input);
        }
        let mut bytes = input.concat();
        bytes.truncate(INPUT_BYTES_MAX);
        bytes
    }

    /// Keeps an input with a new outcome, as a start for further ones.
    pub fn keep(&mut self, input: Vec<u8>) {
        match self.pool.len() - self.seeds {
            kept if kept < KEPT_MAX => self.pool.push(input),
            kept => {
                let at = self.seeds + self.chance.random_range(0..kept);
                self.pool[at] = input;
            }
        }
    }

    fn change(&mut self, input: &mut Vec<Vec<u8>>) {
        let chance = &mut self.chance;
        let word = self.words.choose(chance).cloned().unwrap_or_default();
        let at = chance.random_range(0..=input.len());
        let run = some(chance, input.len());
        match chance.random_range(0..9_u32) {
            0 | 1 if at < input.len() => input[at] = word,
            2 => input.insert(at, word),
            3 => drop(input.drain(run)),
            4 => {
                let copy = input[run].to_vec();
                drop(input.splice(at..at, copy));
            }
            5 => {
                let other = parts(self.pool.choose(chance).expect("never empty"));
                let piece = other[some(chance, other.len())].to_vec();
                drop(input.splice(run, piece));
            }
            6 if at < input.len() && !input[at].is_empty() => {
                let byte = chance.random_range(0..input[at].len());
                input[at][byte] ^= 1 << chance.random_range(0..8_u32);
            }
            7 if at < input.len() => {
                let byte = chance.random_range(0..=input[at].len());
                input[at].insert(byte, chance.random());
            }
            8 if at < input.len() && chance.random_range(0..8_u32) == 0 => {
                let copies = 1 << chance.random_range(0..=COPIES_LOG_MAX);
                let fits = INPUT_BYTES_MAX / input[at].len().max(1);
                input[at] = input[at].repeat(copies.min(fits));
            }
            _ => {}
        }
    }
}

/// A run of up to 16 words.
fn some(chance: &mut ChaCha8Rng, len: usize) -> Range<usize> {
    let begin = chance.random_range(0..=len);
    begin..len.min(begin + chance.random_range(0..=16_usize))
}

/// Splits into strings, runs of characters of numbers and names, and single bytes.
fn parts(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut parts = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || b"_.+-".contains(byte) || !byte.is_ascii();
        let length = match rest[0] {
            b'"' => rest[1..].iter().position(|&byte| byte == b'"').map_or(1, |end| end + 2),
            _ => rest.iter().take_while(|byte| is_word(byte)).count().max(1),
        };
        parts.push(rest[..length].to_vec());
        at += length;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_join_to_the_whole() {
        for text in ["", "{\"a\": [1, -2.5e3], \"b\": null}", "\"open", "ä\u{1F600} x"] {
            assert_eq!(parts(text.as_bytes()).concat(), text.as_bytes());
        }
        assert_eq!(parts(b"{\"a b\":-1}"), [&b"{"[..], b"\"a b\"", b":", b"-1", b"}"]);
    }

    #[test]
    fn the_same_number_gives_the_same_inputs_and_most_are_new() {
        let seeds = || vec![b"{\"a\": [1, 2]}".to_vec(), b"{\"b\": {\"c\": 3}}".to_vec()];
        let inputs = |number| {
            let mut mutator = Mutator::new(seeds(), number);
            (0..200).map(|_| mutator.input()).collect::<Vec<_>>()
        };
        assert_eq!(inputs(1), inputs(1));
        assert_ne!(inputs(1), inputs(2));
        let distinct: std::collections::BTreeSet<_> = inputs(1).into_iter().collect();
        assert!(distinct.len() > 150, "{}", distinct.len());
    }
}
