//! Which nodes have seen how much of which prompts: a tree of hashes over pieces of prompts, bounded in size.
//!
//! A piece's key is a hash over all of the prompt up to its end, so a table of keys is the tree: a prompt is followed
//! from its first piece down to the last one that is known.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Mutex, PoisonError};

/// Pieces of one prompt that are looked at, and so the depth of the tree.
pub(super) const DEPTH: usize = 192;
/// Nodes remembered for a piece.
const OWNERS: usize = 4;
/// Parts with a lock of their own. A prompt is all in one: that of its first piece.
const SHARDS: usize = 16;

/// The keys of a prompt's pieces, from its beginning on.
pub(super) struct Path {
    keys: [u64; DEPTH],
    len: usize,
}

impl Path {
    /// The empty prompt of a model.
    pub(super) fn new(model: &str) -> Self {
        let mut keys = [0; DEPTH];
        keys[0] = hash(1, model.as_bytes());
        Self { keys, len: 0 }
    }

    /// Appends text. Pieces are short at first, where prompts tell apart, and grow with the depth.
    pub(super) fn push(&mut self, mut text: &[u8]) {
        while self.len < DEPTH {
            let size = piece(self.len);
            if text.len() < size {
                return; // the rest is too short to be worth a piece
            }
            let before = self.keys[self.len.saturating_sub(1)];
            self.keys[self.len] = hash(before, &text[..size]);
            self.len += 1;
            text = &text[size..];
        }
    }

    fn keys(&self) -> &[u64] {
        &self.keys[..self.len]
    }
}

/// Bytes of the piece at this depth: 128 up to 4 KiB, 512 up to 32 KiB, 2 KiB up to 240 KiB.
fn piece(depth: usize) -> usize {
    match depth {
        0..32 => 128,
        32..88 => 512,
        _ => 2048,
    }
}

/// See the module.
pub(super) struct PrefixTree {
    shards: [Mutex<Shard>; SHARDS],
    /// Pieces a shard's generation may hold.
    room: usize,
}

/// Two generations: what was used lately, and what is forgotten when that is full.
#[derive(Default)]
struct Shard {
    young: Table,
    old: Table,
}

type Table = HashMap<u64, [u32; OWNERS], BuildHasherDefault<AsItIs>>;

impl PrefixTree {
    /// A tree of at most `pieces` pieces.
    pub(super) fn new(pieces: usize) -> Self {
        Self {
            shards: std::array::from_fn(|_| Mutex::default()),
            room: (pieces / SHARDS / 2).max(1),
        }
    }

    /// Follows a prompt: `visit` sees the owners of each known piece, most recent first, from the beginning on.
    pub(super) fn follow(&self, path: &Path, mut visit: impl FnMut(&[u32])) {
        let Some(first) = path.keys().first() else {
            return;
        };
        let shard = self.shard(*first);
        for key in path.keys() {
            let Some(owners) = shard.young.get(key).or_else(|| shard.old.get(key)) else {
                return;
            };
            let known = owners.iter().position(|owner| *owner == 0);
            visit(&owners[..known.unwrap_or(OWNERS)]);
        }
    }

    /// Notes that `owner` sees this prompt.
    pub(super) fn insert(&self, path: &Path, owner: u32) {
        let Some(first) = path.keys().first() else {
            return;
        };
        let mut shard = self.shard(*first);
        for key in path.keys() {
            let known = match shard.young.get_mut(key) {
                Some(owners) => {
                    to_front(owners, owner);
                    continue;
                }
                None => shard.old.remove(key),
            };
            let mut owners = known.unwrap_or_default();
            to_front(&mut owners, owner);
            if shard.young.len() >= self.room {
                shard.old = std::mem::take(&mut shard.young);
            }
            shard.young.insert(*key, owners);
        }
    }

    /// Pieces remembered.
    #[cfg(test)]
    fn len(&self) -> usize {
        let lens = self.shards.iter().map(|shard| {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.young.len() + shard.old.len()
        });
        lens.sum()
    }

    fn shard(&self, first: u64) -> std::sync::MutexGuard<'_, Shard> {
        let shard = &self.shards[(first >> 32) as usize % SHARDS];
        shard.lock().unwrap_or_else(PoisonError::into_inner) // a hint that is half written is a hint
    }
}

fn to_front(owners: &mut [u32; OWNERS], owner: u32) {
    let place = owners.iter().position(|known| *known == owner);
    owners[..=place.unwrap_or(OWNERS - 1)].rotate_right(1);
    owners[0] = owner;
}

/// Keys are hashes already.
#[derive(Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("keys are u64")
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = key;
    }
}

/// A quick hash of bytes: what it decides is where a request runs well, not whether it runs.
pub(super) fn hash(seed: u64, bytes: &[u8]) -> u64 {
    const SPICE: u64 = 0x9e37_79b9_7f4a_7c15;
    let mix = |state: u64, word: u64| {
        let product = u128::from(state ^ word ^ SPICE) * u128::from(SPICE | 1);
        (product as u64) ^ ((product >> 64) as u64)
    };
    let mut state = mix(seed, bytes.len() as u64);
    let mut words = bytes.chunks_exact(8);
    for word in &mut words {
        let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
        state = mix(state.rotate_left(23), word);
    }
    let mut last = [0; 8];
    last[..words.remainder().len()].copy_from_slice(words.remainder());
    mix(mix(state.rotate_left(23), u64::from_le_bytes(last)), SPICE)
}

/// A number for a node with one load of a model, by which is known what prompts it has seen; never zero.
#[must_use]
pub fn owner(node: &str, model: &str, since: u64) -> u32 {
    let hashed = hash(hash(since, node.as_bytes()), model.as_bytes());
    (hashed as u32).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    fn path(text: &str) -> Path {
        let mut path = Path::new("m");
        path.push(text.as_bytes());
        path
    }

    fn depth_of(tree: &PrefixTree, text: &str, owner: u32) -> usize {
        let (mut depth, mut deepest) = (0, 0);
        tree.follow(&path(text), |owners| {
            depth += 1;
            if owners.contains(&owner) {
                deepest = depth;
            }
        });
        deepest
    }

    #[test]
    fn a_prompt_that_goes_on_is_found_as_deep_as_it_was_seen() {
        let tree = PrefixTree::new(10_000);
        let head = "a".repeat(1000);
        tree.insert(&path(&head), 7);
        assert_eq!(depth_of(&tree, &head, 7), 7, "seven whole pieces");
        let longer = head.clone() + &"b".repeat(1000);
        assert_eq!(depth_of(&tree, &longer, 7), 7);
        tree.insert(&path(&longer), 8);
        assert_eq!(depth_of(&tree, &longer, 8), 15);
        assert_eq!(depth_of(&tree, &longer, 7), 7);
        assert_eq!(depth_of(&tree, &("c".to_owned() + &head), 7), 0);
        let mut other = Path::new("another model");
        other.push(head.as_bytes());
        tree.follow(&other, |_| panic!("it is that model's own tree"));
    }

    #[test]
    fn a_piece_remembers_its_latest_nodes() {
        let tree = PrefixTree::new(1000);
        let text = "x".repeat(128);
        for owner in 1..=6 {
            tree.insert(&path(&text), owner);
        }
        tree.insert(&path(&text), 4);
        let mut seen = Vec::new();
        tree.follow(&path(&text), |owners| seen = owners.to_vec());
        assert_eq!(seen, [4, 6, 5, 3]);
    }

    #[test]
    fn random_prompts_never_grow_it_past_its_bound_and_the_latest_is_known() {
        let mut random = StdRng::seed_from_u64(3);
        let tree = PrefixTree::new(16 * 2 * 64);
        for turn in 1..20_000u32 {
            let length = random.random_range(1..40) * 128;
            let text: String = (0..length / 8)
                .map(|_| format!("{:08}", random.random_range(0..3)))
                .collect();
            tree.insert(&path(&text), turn);
            assert!(tree.len() <= 16 * 2 * 64, "turn {turn}: {}", tree.len());
            assert!(depth_of(&tree, &text, turn) > 0, "turn {turn}");
        }
    }
}
