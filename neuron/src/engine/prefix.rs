//! What sequences of the past have left for those to come: a tree over blocks of tokens, some of whose places carry a
//! snapshot from which a sequence can go on.
//!
//! Keys and values alone are not enough in a hybrid model: the recurrent state exists only where it was saved. So a
//! lookup ends at the deepest *snapshot*, and where blocks reach further than snapshots do it says so, that one may be
//! saved there this time. The tree knows tokens and bytes; blocks and snapshots are the runner's.

use crate::memory::pool::BLOCK;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// A place of a fork is worth a snapshot when it lies at least so many tokens behind the last one.
const WORTH: usize = 2 * BLOCK;

/// In a long prompt the state is saved after so many tokens at the latest.
const STRIDE: usize = 2048;

/// Where in a prompt its state is worth saving for others: at the end of its first message (instructions and tools,
/// which conversations share), where its last message begins (up to there the next turn of the conversation is the
/// same, whatever the template makes of the answer), and now and then in between. `turn` is the token that begins a
/// message. With several `answers` all but the first go on from the prompt's last token.
#[must_use]
pub fn places(prompt: &[u32], turn: Option<u32>, answers: usize) -> Vec<usize> {
    let starts = |token: &u32| Some(*token) == turn;
    let second = prompt.iter().skip(1).position(starts).map(|at| at + 1);
    let last = prompt.iter().rposition(starts);
    let end = (answers > 1).then(|| prompt.len() - 1);
    let mut wanted: Vec<usize> = [second, last].into_iter().flatten().collect();
    wanted.extend((STRIDE..prompt.len()).step_by(STRIDE));
    wanted.sort_unstable();
    let mut places: Vec<usize> = Vec::new();
    for place in wanted {
        if place >= places.last().copied().unwrap_or(0) + WORTH {
            places.push(place);
        }
    }
    places.extend(end.filter(|end| places.last().is_none_or(|last| end > last) && *end > 0));
    places
}

type NodeId = usize;
/// When something was last of use; never the same twice.
type Tick = u64;

/// Blocks `B` and snapshots `S` by the tokens they are of.
#[derive(Debug)]
pub struct PrefixTree<B, S> {
    nodes: HashMap<NodeId, Node<B, S>>,
    next_node: NodeId,
    /// Whoever has the same salt shares a tree.
    roots: HashMap<Option<Arc<str>>, NodeId>,
    /// Nodes without children, the one longest out of use first.
    leaves: BTreeMap<Tick, NodeId>,
    /// Snapshots where they are used.
    near: Tier,
    /// Snapshots that were moved out of the way.
    far: Tier,
    tick: Tick,
    evicted: u64,
    spilled: u64,
}

/// Snapshots in one kind of memory.
#[derive(Debug)]
struct Tier {
    /// Their nodes, the snapshot longest out of use first.
    saved: BTreeMap<Tick, NodeId>,
    bytes: u64,
    /// What they may hold.
    budget: u64,
}

impl Tier {
    fn new(budget: u64) -> Self {
        Self {
            saved: BTreeMap::new(),
            bytes: 0,
            budget,
        }
    }
}

/// What can be moved out of the way to where there is more room, and still be used from there.
pub trait Spill {
    /// Moves it. False where there is no other place than the one it is in, or it could not be moved.
    fn spill(&mut self) -> bool;
}

#[derive(Debug)]
struct Node<B, S> {
    /// None for a root.
    parent: Option<NodeId>,
    /// The block's tokens; none of a root.
    tokens: Box<[u32]>,
    /// None for a root.
    block: Option<B>,
    children: HashMap<Box<[u32]>, NodeId>,
    snapshots: Vec<Saved<S>>,
    used: Tick,
}

/// A snapshot some tokens, fewer than a block, behind its node.
#[derive(Debug)]
struct Saved<S> {
    tail: Box<[u32]>,
    snapshot: S,
    bytes: u64,
    used: Tick,
    /// Whether it was moved out of the way.
    far: bool,
}

/// Where a sequence can go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found<B, S> {
    /// The full blocks before the snapshot.
    pub blocks: Vec<B>,
    /// The deepest snapshot of its tokens.
    pub snapshot: S,
    /// Tokens before it.
    pub tokens: usize,
}

/// What a lookup gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lookup<B, S> {
    /// Where to go on from, if anywhere.
    pub found: Option<Found<B, S>>,
    /// Where other sequences part from this one, further on: the next one that does will want a snapshot there.
    pub fork: Option<usize>,
}

impl<B: Clone, S: Clone + Spill> PrefixTree<B, S> {
    /// An empty tree whose snapshots may hold so many bytes, and so many more when they are moved out of the way.
    #[must_use]
    pub fn new(near: u64, far: u64) -> Self {
        Self {
            nodes: HashMap::new(),
            next_node: 0,
            roots: HashMap::new(),
            leaves: BTreeMap::new(),
            near: Tier::new(near),
            far: Tier::new(far),
            tick: 0,
            evicted: 0,
            spilled: 0,
        }
    }

    /// Changes what its snapshots may hold; those longest out of use go until the others are within it.
    pub fn set_budget(&mut self, near: u64, far: u64) {
        (self.near.budget, self.far.budget) = (near, far);
        while self.near.bytes > near && self.make_way() {}
        while self.far.bytes > far && self.evict_snapshot(true) {}
    }

    /// Finds the longest beginning of `tokens` to go on from. The last token is never part of it: somebody has to
    /// compute the logits.
    pub fn find(&mut self, salt: Option<&Arc<str>>, tokens: &[u32]) -> Lookup<B, S> {
        let most = tokens.len().saturating_sub(1);
        let mut found: Option<(NodeId, usize, usize)> = None; // node, which of its snapshots, tokens
        let mut path = Vec::new();
        let mut at = self.roots.get(&salt.cloned()).copied();
        let mut known = 0;
        while let Some(id) = at {
            let node = &self.nodes[&id];
            let depth = path.len() * BLOCK;
            let rest = &tokens[depth..most];
            let fits = |saved: &Saved<S>| rest.starts_with(&saved.tail);
            let best = (node.snapshots.iter().enumerate())
                .filter(|(_, saved)| fits(saved))
                .max_by_key(|(_, saved)| saved.tail.len());
            if let Some((index, saved)) = best {
                found = Some((id, index, depth + saved.tail.len()));
            }
            at = rest
                .get(..BLOCK)
                .and_then(|block| node.children.get(block))
                .copied();
            match at {
                Some(child) => path.push(child),
                None => known = depth + node.shared_with_a_child(rest),
            }
        }
        let fork = known.saturating_sub(found.map_or(0, |(_, _, tokens)| tokens)) >= WORTH;
        let blocks = |tokens: usize| {
            let full = path[..tokens / BLOCK].iter();
            full.filter_map(|id| self.nodes[id].block.clone()).collect()
        };
        let lookup = Lookup {
            found: found.map(|(id, index, tokens)| Found {
                blocks: blocks(tokens),
                snapshot: self.nodes[&id].snapshots[index].snapshot.clone(),
                tokens,
            }),
            fork: fork.then_some(known),
        };
        if let Some((id, index, _)) = found {
            self.use_snapshot(id, index);
        }
        for id in path {
            self.use_node(id);
        }
        lookup
    }

    /// Keeps the full blocks of `tokens`, the n-th of which is `block(n)`, and a snapshot of what they end in, unless they are known already.
    /// Returns whether the snapshot was new and was kept.
    pub fn keep(
        &mut self,
        salt: Option<&Arc<str>>,
        tokens: &[u32],
        block: impl Fn(usize) -> B,
        snapshot: impl FnOnce() -> Option<(S, u64)>,
    ) -> bool {
        let mut id = self.root(salt);
        let full = tokens.chunks_exact(BLOCK);
        let tail = full.remainder();
        for (at, tokens) in full.enumerate() {
            id = self.child(id, tokens, || block(at));
            self.use_node(id);
        }
        let known = self.nodes[&id].snapshots.iter();
        if let Some(index) = known.into_iter().position(|saved| *saved.tail == *tail) {
            self.use_snapshot(id, index);
            return false;
        }
        let Some((snapshot, bytes)) = snapshot() else {
            return false;
        };
        if bytes > self.near.budget {
            return false;
        }
        while self.near.bytes + bytes > self.near.budget {
            self.make_way();
        }
        if !self.nodes.contains_key(&id) {
            id = self.root(salt); // making room has emptied it
        }
        let used = self.next_tick();
        self.near.saved.insert(used, id);
        self.near.bytes += bytes;
        self.node(id).snapshots.push(Saved {
            tail: tail.into(),
            snapshot,
            bytes,
            used,
            far: false,
        });
        true
    }

    /// Lets a block go, one that `frees` memory if there is one: the leaf longest out of use, and with it its snapshots.
    /// False when there is nothing left to let go.
    pub fn evict(&mut self, frees: impl Fn(&B) -> bool) -> bool {
        let frees = |id: &NodeId| self.nodes[id].block.as_ref().is_some_and(&frees);
        let leaf = self.leaves.values().find(|id| frees(id));
        let Some(id) = leaf.or(self.leaves.values().next()).copied() else {
            return self.evict_snapshot(false) || self.evict_snapshot(true);
        };
        let Some(node) = self.nodes.remove(&id) else {
            return false;
        };
        self.leaves.remove(&node.used);
        for saved in &node.snapshots {
            let tier = self.tier(saved.far);
            tier.saved.remove(&saved.used);
            tier.bytes -= saved.bytes;
            self.evicted += 1;
        }
        if let Some(parent) = node.parent {
            self.node(parent).children.remove(&node.tokens);
            let parent_node = &self.nodes[&parent];
            if parent_node.children.is_empty() && parent_node.block.is_some() {
                self.leaves.insert(parent_node.used, parent);
            }
            self.drop_empty_root(parent);
        }
        true
    }

    /// A salt that has nothing left is forgotten: anybody may make up new ones for ever.
    fn drop_empty_root(&mut self, id: NodeId) {
        let node = &self.nodes[&id];
        if node.block.is_none() && node.children.is_empty() && node.snapshots.is_empty() {
            self.nodes.remove(&id);
            self.roots.retain(|_, root| *root != id);
        }
    }

    /// Bytes of its snapshots where they are used, and of those that were moved out of the way.
    #[must_use]
    pub fn snapshot_bytes(&self) -> (u64, u64) {
        (self.near.bytes, self.far.bytes)
    }

    /// Snapshots moved out of the way since this was last asked.
    pub fn take_spilled(&mut self) -> u64 {
        std::mem::take(&mut self.spilled)
    }

    /// Snapshots let go since this was last asked.
    pub fn take_evicted(&mut self) -> u64 {
        std::mem::take(&mut self.evicted)
    }

    fn tier(&mut self, far: bool) -> &mut Tier {
        if far { &mut self.far } else { &mut self.near }
    }

    /// Moves the snapshot longest out of use out of the way, or lets it go where there is no room for it.
    fn make_way(&mut self) -> bool {
        let Some((tick, id)) = self.near.saved.first_key_value() else {
            return false;
        };
        let (tick, id) = (*tick, *id);
        let budget = self.far.budget;
        let saved = self.saved(id, tick);
        let bytes = saved.bytes;
        if bytes > budget || !saved.snapshot.spill() {
            return self.evict_snapshot(false);
        }
        saved.far = true;
        self.near.saved.remove(&tick);
        self.near.bytes -= bytes;
        self.far.saved.insert(tick, id);
        self.far.bytes += bytes;
        self.spilled += 1;
        while self.far.bytes > budget {
            self.evict_snapshot(true);
        }
        true
    }

    /// The snapshot of a node that was used last at `tick`.
    fn saved(&mut self, id: NodeId, tick: Tick) -> &mut Saved<S> {
        let mut saved = self.node(id).snapshots.iter_mut();
        saved
            .find(|saved| saved.used == tick)
            .expect("a tier lists what nodes have")
    }

    /// Lets the snapshot of a tier go that is longest out of use; its blocks stay.
    fn evict_snapshot(&mut self, far: bool) -> bool {
        let Some((tick, id)) = self.tier(far).saved.pop_first() else {
            return false;
        };
        let bytes = self.saved(id, tick).bytes;
        self.node(id).snapshots.retain(|saved| saved.used != tick);
        self.tier(far).bytes -= bytes;
        self.evicted += 1;
        self.drop_empty_root(id);
        true
    }

    fn root(&mut self, salt: Option<&Arc<str>>) -> NodeId {
        if let Some(root) = self.roots.get(&salt.cloned()) {
            return *root;
        }
        let id = self.add(None, Box::default(), None);
        self.roots.insert(salt.cloned(), id);
        id
    }

    fn child(&mut self, parent: NodeId, tokens: &[u32], block: impl FnOnce() -> B) -> NodeId {
        if let Some(child) = self.nodes[&parent].children.get(tokens) {
            return *child;
        }
        let used = self.nodes[&parent].used;
        self.leaves.remove(&used);
        let id = self.add(Some(parent), tokens.into(), Some(block()));
        self.node(parent).children.insert(tokens.into(), id);
        let used = self.nodes[&id].used;
        self.leaves.insert(used, id);
        id
    }

    fn add(&mut self, parent: Option<NodeId>, tokens: Box<[u32]>, block: Option<B>) -> NodeId {
        let id = self.next_node;
        self.next_node += 1;
        let used = self.next_tick();
        let node = Node {
            parent,
            tokens,
            block,
            children: HashMap::new(),
            snapshots: Vec::new(),
            used,
        };
        self.nodes.insert(id, node);
        id
    }

    fn node(&mut self, id: NodeId) -> &mut Node<B, S> {
        self.nodes.get_mut(&id).expect("an id of the tree's own")
    }

    fn use_node(&mut self, id: NodeId) {
        let used = self.next_tick();
        let before = std::mem::replace(&mut self.node(id).used, used);
        if self.leaves.remove(&before).is_some() {
            self.leaves.insert(used, id);
        }
    }

    fn use_snapshot(&mut self, id: NodeId, index: usize) {
        let used = self.next_tick();
        let saved = &mut self.node(id).snapshots[index];
        let (before, far) = (std::mem::replace(&mut saved.used, used), saved.far);
        let tier = self.tier(far);
        tier.saved.remove(&before);
        tier.saved.insert(used, id);
    }

    fn next_tick(&mut self) -> Tick {
        self.tick += 1;
        self.tick
    }
}

impl<B, S> Node<B, S> {
    /// How many of `tokens` one of its children begins with.
    fn shared_with_a_child(&self, tokens: &[u32]) -> usize {
        let shared = |child: &[u32]| {
            let pairs = child.iter().zip(tokens);
            pairs.take_while(|(child, token)| child == token).count()
        };
        self.children
            .keys()
            .map(|child| shared(child))
            .max()
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use std::collections::HashSet;

    /// The block of tokens is what was computed from them: all tokens up to its end.
    type Tree = PrefixTree<Arc<[u32]>, Kept>;

    /// A snapshot: its tokens, and whether it was moved.
    #[derive(Debug, Clone, PartialEq)]
    struct Kept(Vec<u32>, bool);

    impl Spill for Kept {
        fn spill(&mut self) -> bool {
            !std::mem::replace(&mut self.1, true)
        }
    }

    fn blocks(tokens: &[u32]) -> Vec<Arc<[u32]>> {
        (1..=tokens.len() / BLOCK)
            .map(|count| tokens[..count * BLOCK].into())
            .collect()
    }

    fn keep(tree: &mut Tree, tokens: &[u32]) -> bool {
        let block = |at: usize| blocks(tokens)[at].clone();
        tree.keep(None, tokens, block, || {
            Some((Kept(tokens.to_vec(), false), 1))
        })
    }

    fn counted(from: u32, count: usize) -> Vec<u32> {
        (from..).take(count).collect()
    }

    #[test]
    fn states_are_saved_where_messages_begin_and_now_and_then() {
        let turn = 9;
        let mut prompt = vec![0; 5000];
        assert_eq!(places(&prompt, Some(turn), 1), [2048, 4096]);
        for start in [0, 300, 700, 4990] {
            prompt[start] = turn;
        }
        assert_eq!(places(&prompt, Some(turn), 1), [300, 2048, 4096, 4990]);
        assert_eq!(places(&prompt, None, 1), [2048, 4096]);
        let mut short = vec![turn; 2];
        short.extend([0; 40]);
        assert!(places(&short, Some(turn), 1).is_empty(), "nothing is won");
        assert_eq!(places(&short, Some(turn), 2), [41]);
        assert!(places(&[0], None, 2).is_empty());
    }

    #[test]
    fn a_sequence_goes_on_from_the_deepest_snapshot_of_its_beginning() {
        for cut in [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3] {
            let mut tree = Tree::new(100, 0);
            let tokens = counted(0, 200);
            assert!(keep(&mut tree, &tokens[..cut]));
            assert!(!keep(&mut tree, &tokens[..cut]), "it is known");
            let found = tree.find(None, &tokens).found.unwrap();
            assert_eq!(found.tokens, cut);
            assert_eq!(found.snapshot.0, tokens[..cut]);
            assert_eq!(found.blocks, blocks(&tokens[..cut]));
            assert_eq!(
                tree.find(None, &tokens[..cut]).found,
                None,
                "the last token is always computed"
            );
            let mut other = tokens.clone();
            other[cut - 1] = 999;
            assert_eq!(tree.find(None, &other).found, None);
        }
    }

    #[test]
    fn who_has_another_salt_finds_nothing() {
        let mut tree = Tree::new(100, 0);
        let tokens = counted(0, 50);
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let kept = || Some((Kept(tokens[..40].to_vec(), false), 1));
        let block = |at: usize| blocks(&tokens[..40])[at].clone();
        assert!(
            !tree.keep(Some(&a), &tokens[..40], block, || None),
            "no room for it"
        );
        let block = |at: usize| blocks(&tokens[..40])[at].clone();
        tree.keep(Some(&a), &tokens[..40], block, kept);
        assert!(tree.find(Some(&a), &tokens).found.is_some());
        assert!(tree.find(Some(&b), &tokens).found.is_none());
        assert!(tree.find(None, &tokens).found.is_none());
    }

    #[test]
    fn the_place_where_sequences_part_is_told_once_it_is_worth_it() {
        let mut tree = Tree::new(100, 0);
        let first = counted(0, 100);
        keep(&mut tree, &first);
        for (shared, told) in [
            (WORTH - 1, None),
            (WORTH + 5, Some(WORTH + 5)),
            (70, Some(70)),
        ] {
            let second = [&first[..shared], &counted(1000, 50)].concat();
            assert_eq!(tree.find(None, &second).fork, told, "{shared} shared");
        }
        keep(&mut tree, &first[..70]);
        let second = [&first[..70], &counted(1000, 50)].concat();
        let lookup = tree.find(None, &second);
        assert_eq!((lookup.found.unwrap().tokens, lookup.fork), (70, None));
    }

    #[test]
    fn the_snapshot_longest_out_of_use_goes_first_and_its_blocks_stay() {
        let mut tree = Tree::new(2, 0);
        let sequences: Vec<Vec<u32>> = (0..3).map(|n| counted(n * 1000, 64)).collect();
        let longer = |n: usize| [&sequences[n][..], &[7]].concat();
        keep(&mut tree, &sequences[0]);
        keep(&mut tree, &sequences[1]);
        assert!(tree.find(None, &longer(0)).found.is_some(), "and is used");
        keep(&mut tree, &sequences[2]);
        assert_eq!(tree.take_evicted(), 1);
        let lookup = tree.find(None, &longer(1));
        assert_eq!((lookup.found, lookup.fork), (None, Some(64)));
        assert!(tree.find(None, &longer(0)).found.is_some());
        assert!(tree.find(None, &longer(2)).found.is_some());
    }

    #[test]
    fn a_smaller_budget_lets_the_oldest_snapshots_go_and_a_larger_one_none() {
        let mut tree = Tree::new(3, 0);
        let sequences: Vec<Vec<u32>> = (0..3).map(|n| counted(n * 1000, 40)).collect();
        for tokens in &sequences {
            keep(&mut tree, tokens);
        }
        tree.set_budget(1, 0);
        assert_eq!((tree.take_evicted(), tree.snapshot_bytes()), (2, (1, 0)));
        let known = |tree: &mut Tree, n: usize| {
            let longer = [&sequences[n][..], &[7]].concat();
            tree.find(None, &longer).found.is_some()
        };
        assert!(!known(&mut tree, 0) && !known(&mut tree, 1) && known(&mut tree, 2));
        tree.set_budget(2, 0);
        assert!(keep(&mut tree, &sequences[0]));
        assert!(known(&mut tree, 0) && known(&mut tree, 2));
        tree.set_budget(0, 0);
        assert_eq!((tree.take_evicted(), tree.snapshot_bytes()), (2, (0, 0)));
        assert!(!keep(&mut tree, &sequences[1]), "there is no room");
    }

    #[test]
    fn snapshots_move_out_of_the_way_before_they_go() {
        let mut tree = Tree::new(2, 2);
        let sequences: Vec<Vec<u32>> = (0..5).map(|n| counted(n * 1000, 40)).collect();
        for tokens in &sequences {
            keep(&mut tree, tokens);
        }
        assert_eq!((tree.take_spilled(), tree.take_evicted()), (3, 1));
        assert_eq!(tree.snapshot_bytes(), (2, 2));
        let mut moved = |n: usize| {
            let longer = [&sequences[n][..], &[7]].concat();
            let found = tree.find(None, &longer).found;
            found.map(|found| found.snapshot.1)
        };
        let all: Vec<_> = (0..5).map(&mut moved).collect();
        assert_eq!(
            all,
            [None, Some(true), Some(true), Some(false), Some(false)]
        );
        tree.set_budget(2, 1);
        assert_eq!((tree.take_evicted(), tree.snapshot_bytes()), (1, (2, 1)));
        while tree.evict(|_| true) {}
        assert_eq!(tree.snapshot_bytes(), (0, 0));
    }

    #[test]
    fn random_lives_keep_the_invariants() {
        for seed in 0..10 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let (mut near, mut far) = (6, 3);
            let mut tree = Tree::new(near, far);
            let mut kept: HashSet<Vec<u32>> = HashSet::new();
            for _ in 0..2000 {
                // few different tokens, so that beginnings are shared
                let length = rng.random_range(1..6 * BLOCK);
                let mut tokens = vec![0; length];
                for token in tokens.iter_mut().step_by(BLOCK / 2) {
                    *token = rng.random_range(0..2);
                }
                match rng.random_range(0..4) {
                    0 => {
                        if keep(&mut tree, &tokens) {
                            kept.insert(tokens);
                        }
                    }
                    1 => {
                        let lookup = tree.find(None, &tokens);
                        if let Some(found) = &lookup.found {
                            assert!(found.tokens < tokens.len());
                            assert_eq!(found.snapshot.0, tokens[..found.tokens], "seed {seed}");
                            assert_eq!(found.blocks, blocks(&tokens[..found.tokens]));
                            assert!(kept.contains(&found.snapshot.0));
                        }
                        if let Some(fork) = lookup.fork {
                            assert!(fork < tokens.len());
                        }
                    }
                    2 => {
                        tree.evict(|block| block.len() > BLOCK);
                    }
                    _ => {
                        (near, far) = (rng.random_range(1..=6), rng.random_range(0..=4));
                        tree.set_budget(near, far);
                    }
                }
                let snapshots = tree.nodes.values().flat_map(|node| &node.snapshots);
                let moved = |saved: &&Saved<Kept>| {
                    assert_eq!(saved.far, saved.snapshot.1, "seed {seed}");
                    saved.far
                };
                let (moved, there): (Vec<_>, Vec<_>) = snapshots.partition(moved);
                for (tier, found, most) in [(&tree.near, there, near), (&tree.far, moved, far)] {
                    let count = found.len();
                    assert_eq!((tier.bytes, tier.saved.len()), (count as u64, count));
                    assert!(count as u64 <= most, "seed {seed}");
                }
                let leaves = tree.nodes.values();
                let leaves = leaves.filter(|node| node.children.is_empty() && node.block.is_some());
                assert_eq!(tree.leaves.len(), leaves.count(), "seed {seed}");
            }
            while tree.evict(|_| true) {}
            assert_eq!((tree.nodes.len(), tree.roots.len()), (0, 0), "seed {seed}");
            assert_eq!(tree.snapshot_bytes(), (0, 0), "seed {seed}");
        }
    }
}
