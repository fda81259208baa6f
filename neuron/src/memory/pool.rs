//! Keys and values in blocks of equal size, handed out from one pool and shared by counting references.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Tokens whose keys and values lie in one block.
pub const BLOCK: usize = 16;

/// What the keys and values of one token are, over all layers that keep some.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Layers with keys and values.
    pub layers: usize,
    /// Heads of each, on this rank.
    pub heads: usize,
    /// Width of a head.
    pub dim: usize,
}

impl KvShape {
    /// Numbers in a block.
    #[must_use]
    pub fn block_floats(&self) -> usize {
        2 * self.layers * self.heads * BLOCK * self.dim
    }

    /// Blocks that hold `tokens` tokens.
    #[must_use]
    pub fn blocks(tokens: usize) -> usize {
        tokens.div_ceil(BLOCK)
    }

    /// Where the keys of a layer and head begin in a block; the values follow them.
    fn place(&self, layer: usize, head: usize) -> usize {
        2 * (layer * self.heads + head) * BLOCK * self.dim
    }
}

/// Every block of a model. Copies are handles of the same pool.
#[derive(Debug, Clone)]
pub struct KvPool {
    shape: KvShape,
    shared: Arc<Mutex<Shelf>>,
}

#[derive(Debug)]
struct Shelf {
    /// Blocks that may be out at once.
    capacity: usize,
    out: usize,
    /// Memory of blocks that came back, to be handed out again.
    spare: Vec<Box<[f32]>>,
}

/// One block: returned to its pool when its last holder lets go.
#[derive(Debug)]
pub struct Block {
    floats: Box<[f32]>,
    pool: KvPool,
}

impl KvPool {
    /// A pool without a bound, until [`Self::set_capacity`].
    #[must_use]
    pub fn new(shape: KvShape) -> Self {
        let shelf = Shelf {
            capacity: usize::MAX,
            out: 0,
            spare: Vec::new(),
        };
        Self {
            shape,
            shared: Arc::new(Mutex::new(shelf)),
        }
    }

    /// Bounds the blocks that may be out at once. Of those that are out beyond it none is taken away: they go as their
    /// holders let go.
    pub fn set_capacity(&self, blocks: usize) {
        let mut shelf = self.shelf();
        shelf.capacity = blocks;
        let keep = blocks.saturating_sub(shelf.out).min(shelf.spare.len());
        let surplus = shelf.spare.split_off(keep);
        shelf.spare.shrink_to_fit();
        drop(shelf); // giving much memory back takes a while
        drop(surplus);
    }

    /// Blocks that may be out at once.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.shelf().capacity
    }

    /// Blocks that somebody holds.
    #[must_use]
    pub fn out(&self) -> usize {
        self.shelf().out
    }

    /// Blocks there is memory for: those that are out, and those that came back and are kept for the next.
    #[must_use]
    pub fn held(&self) -> usize {
        let shelf = self.shelf();
        shelf.out + shelf.spare.len()
    }

    /// Blocks that could be taken now.
    #[must_use]
    pub fn free(&self) -> usize {
        let shelf = self.shelf();
        shelf.capacity.saturating_sub(shelf.out)
    }

    /// What a block holds.
    #[must_use]
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// A block for new tokens; what is in it is not to be read. None when all are out.
    #[must_use]
    pub fn take(&self) -> Option<Arc<Block>> {
        let mut shelf = self.shelf();
        if shelf.out >= shelf.capacity {
            return None;
        }
        shelf.out += 1;
        let spare = shelf.spare.pop();
        drop(shelf); // fresh memory takes a while
        Some(Arc::new(Block {
            floats: spare.unwrap_or_else(|| vec![0.0; self.shape.block_floats()].into()),
            pool: self.clone(),
        }))
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        // nothing under this lock can panic half-way
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Block {
    /// Keys of a layer and head: `(BLOCK, dim)`.
    #[must_use]
    pub fn keys(&self, layer: usize, head: usize) -> &[f32] {
        let shape = self.pool.shape;
        &self.floats[shape.place(layer, head)..][..BLOCK * shape.dim]
    }

    /// Values of a layer and head: `(BLOCK, dim)`.
    #[must_use]
    pub fn values(&self, layer: usize, head: usize) -> &[f32] {
        let shape = self.pool.shape;
        &self.floats[shape.place(layer, head) + BLOCK * shape.dim..][..BLOCK * shape.dim]
    }

    /// Puts key and value of one token of a layer and head in its place, 0 to [`BLOCK`].
    pub(super) fn put(
        &mut self,
        (layer, head): (usize, usize),
        at: usize,
        key: &[f32],
        value: &[f32],
    ) {
        let shape = self.pool.shape;
        let place = shape.place(layer, head) + at * shape.dim;
        self.floats[place..][..shape.dim].copy_from_slice(key);
        self.floats[place + BLOCK * shape.dim..][..shape.dim].copy_from_slice(value);
    }

    /// A block of its own with the same numbers. None when the pool has none left.
    #[must_use]
    pub fn copied(&self) -> Option<Arc<Self>> {
        let mut copy = self.pool.take()?;
        Arc::get_mut(&mut copy)?
            .floats
            .copy_from_slice(&self.floats);
        Some(copy)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let floats = std::mem::take(&mut self.floats);
        let mut shelf = self.pool.shelf();
        shelf.out -= 1;
        // without a bound nobody counts on the memory, and beyond a bound somebody else does
        if shelf.capacity < usize::MAX && shelf.out + shelf.spare.len() < shelf.capacity {
            shelf.spare.push(floats);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> KvPool {
        KvPool::new(KvShape {
            layers: 2,
            heads: 3,
            dim: 4,
        })
    }

    #[test]
    fn no_more_blocks_are_out_than_the_pool_has_and_all_come_back() {
        let pool = pool();
        pool.set_capacity(2);
        let first = pool.take().unwrap();
        let shared = first.clone();
        let second = pool.take().unwrap();
        assert!(pool.take().is_none());
        assert!(second.copied().is_none());
        drop(first);
        assert_eq!(pool.free(), 0, "somebody still holds it");
        drop(shared);
        assert_eq!((pool.free(), pool.out()), (1, 1));
        drop(second);
        assert_eq!(pool.out(), 0);
    }

    #[test]
    fn memory_beyond_a_smaller_capacity_goes_back_at_once_or_with_the_last_holder() {
        let pool = pool();
        pool.set_capacity(6);
        let mut blocks: Vec<_> = (0..6).map(|_| pool.take().unwrap()).collect();
        blocks.truncate(4);
        assert_eq!((pool.out(), pool.held()), (4, 6), "two are kept for later");
        pool.set_capacity(5);
        assert_eq!(pool.held(), 5);
        pool.set_capacity(2);
        assert_eq!((pool.held(), pool.free()), (4, 0), "four are in use");
        assert!(pool.take().is_none());
        blocks.truncate(1);
        assert_eq!((pool.out(), pool.held()), (1, 2));
        let second = pool.take().unwrap();
        assert!(pool.take().is_none());
        pool.set_capacity(3);
        assert!(pool.take().is_some(), "it may grow again");
        drop((blocks, second));
        assert_eq!((pool.out(), pool.held()), (0, 3));
    }

    #[test]
    fn each_layer_and_head_has_its_own_place() {
        let pool = pool();
        let mut block = pool.take().unwrap();
        let own = Arc::get_mut(&mut block).unwrap();
        for layer in 0..2 {
            for head in 0..3 {
                for at in 0..BLOCK {
                    let mark = (100 * layer + 20 * head + at) as f32;
                    own.put((layer, head), at, &[mark; 4], &[-mark; 4]);
                }
            }
        }
        let copy = block.copied().unwrap();
        for block in [&block, &copy] {
            for layer in 0..2 {
                for head in 0..3 {
                    for at in 0..BLOCK {
                        let mark = (100 * layer + 20 * head + at) as f32;
                        assert_eq!(block.keys(layer, head)[at * 4..][..4], [mark; 4]);
                        assert_eq!(block.values(layer, head)[at * 4..][..4], [-mark; 4]);
                    }
                }
            }
        }
    }
}
