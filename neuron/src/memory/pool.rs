//! Keys and values in blocks of equal size, handed out from one pool and shared by counting references.

use crate::gpu::{Address, Buffer, Gpu};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Tokens whose keys and values lie in one block.
pub const BLOCK: usize = 16;

/// What keys and values are held as. On the CPU that is always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvNumbers {
    /// 4 bytes each, as they are computed.
    F32,
    /// 2 bytes each.
    Bf16,
}

impl KvNumbers {
    /// Bytes of a number.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

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
    numbers: KvNumbers,
    /// The device that has the blocks, where it is not the host.
    gpu: Option<Gpu>,
    shared: Arc<Mutex<Shelf>>,
}

#[derive(Debug)]
struct Shelf {
    /// Blocks that may be out at once.
    capacity: usize,
    out: usize,
    /// Memory of blocks that came back, to be handed out again.
    spare: Vec<Storage>,
}

/// The numbers of a block.
#[derive(Debug)]
enum Storage {
    Host(Box<[f32]>),
    /// The block that begins at this byte of a slab, which goes when all its blocks have gone.
    Device(Arc<Buffer>, usize),
}

/// Bytes that a device is asked for at once, at the least: it takes long over each request, and may wait for all work first.
const SLAB: usize = 32 << 20;

/// One block: returned to its pool when its last holder lets go.
#[derive(Debug)]
pub struct Block {
    /// None only while it is dropped.
    storage: Option<Storage>,
    pool: KvPool,
}

impl KvPool {
    /// A pool in the host's memory, without a bound until [`Self::set_capacity`].
    #[must_use]
    pub fn new(shape: KvShape) -> Self {
        Self::held_as(shape, KvNumbers::F32, None)
    }

    /// A pool on a device, without a bound until [`Self::set_capacity`].
    #[must_use]
    pub fn on_device(shape: KvShape, numbers: KvNumbers, gpu: &Gpu) -> Self {
        Self::held_as(shape, numbers, Some(gpu.clone()))
    }

    fn held_as(shape: KvShape, numbers: KvNumbers, gpu: Option<Gpu>) -> Self {
        let shelf = Shelf {
            capacity: usize::MAX,
            out: 0,
            spare: Vec::new(),
        };
        Self {
            shape,
            numbers,
            gpu,
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

    /// What keys and values are held as.
    #[must_use]
    pub fn numbers(&self) -> KvNumbers {
        self.numbers
    }

    /// Whether its blocks are on a device.
    #[must_use]
    pub fn is_on_device(&self) -> bool {
        self.gpu.is_some()
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        self.shape.block_floats() * self.numbers.bytes()
    }

    /// A block for new tokens; what is in it is not to be read. None when all are out, or the device has no room.
    #[must_use]
    pub fn take(&self) -> Option<Arc<Block>> {
        let mut shelf = self.shelf();
        if shelf.out >= shelf.capacity {
            return None;
        }
        shelf.out += 1;
        let spare = shelf.spare.pop();
        drop(shelf); // fresh memory takes a while
        let Some(storage) = spare.or_else(|| self.fresh()) else {
            self.shelf().out -= 1;
            return None;
        };
        Some(Arc::new(Block {
            storage: Some(storage),
            pool: self.clone(),
        }))
    }

    fn fresh(&self) -> Option<Storage> {
        let Some(gpu) = &self.gpu else {
            return Some(Storage::Host(vec![0.0; self.shape.block_floats()].into()));
        };
        let bytes = self.block_bytes().max(1);
        let count = (SLAB / bytes).max(1);
        match gpu.buffer(count * bytes) {
            Ok(slab) => {
                let slab = Arc::new(slab);
                let others = (1..count).map(|at| Storage::Device(slab.clone(), at * bytes));
                self.shelf().spare.extend(others);
                Some(Storage::Device(slab, 0))
            }
            Err(error) => {
                tracing::warn!(%error, "no further block of keys and values");
                None
            }
        }
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        // nothing under this lock can panic half-way
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Block {
    fn storage(&self) -> &Storage {
        self.storage.as_ref().expect("it is there until the end")
    }

    /// The numbers, in the host's memory.
    fn floats(&self) -> &[f32] {
        match self.storage() {
            Storage::Host(floats) => floats,
            Storage::Device(..) => unreachable!("kernels for the CPU are given blocks of the CPU"),
        }
    }

    /// Keys of a layer and head: `(BLOCK, dim)`.
    ///
    /// # Panics
    /// When it is on a device.
    #[must_use]
    pub fn keys(&self, layer: usize, head: usize) -> &[f32] {
        let shape = self.pool.shape;
        &self.floats()[shape.place(layer, head)..][..BLOCK * shape.dim]
    }

    /// Values of a layer and head: `(BLOCK, dim)`.
    ///
    /// # Panics
    /// When it is on a device.
    #[must_use]
    pub fn values(&self, layer: usize, head: usize) -> &[f32] {
        let shape = self.pool.shape;
        &self.floats()[shape.place(layer, head) + BLOCK * shape.dim..][..BLOCK * shape.dim]
    }

    /// Copies of the keys and values of a layer and head, each `(BLOCK, dim)`, wherever they are. Where a device fails,
    /// there are no numbers.
    #[must_use]
    pub fn both(&self, layer: usize, head: usize) -> [Vec<f32>; 2] {
        let shape = self.pool.shape;
        let (first, count) = (shape.place(layer, head), BLOCK * shape.dim);
        let floats = match (self.storage(), self.pool.numbers) {
            (Storage::Host(floats), _) => floats[first..][..2 * count].to_vec(),
            (Storage::Device(slab, at), KvNumbers::F32) => {
                let first = at / size_of::<f32>() + first;
                slab.read(first, 2 * count).unwrap_or_default()
            }
            (Storage::Device(slab, at), KvNumbers::Bf16) => {
                let first = at / size_of::<bf16>() + first;
                let numbers: Vec<bf16> = slab.read(first, 2 * count).unwrap_or_default();
                numbers.to_f32_vec()
            }
        };
        let (keys, values) = floats.split_at(floats.len() / 2);
        [keys.to_vec(), values.to_vec()]
    }

    /// Where it is on its device; 0 in the host's memory.
    pub(crate) fn address(&self) -> Address {
        match self.storage() {
            Storage::Host(_) => 0,
            Storage::Device(slab, at) => slab.address() + *at as u64,
        }
    }

    /// Puts key and value of one token of a layer and head in its place, 0 to [`BLOCK`].
    pub fn put(&mut self, (layer, head): (usize, usize), at: usize, key: &[f32], value: &[f32]) {
        let shape = self.pool.shape;
        let place = shape.place(layer, head) + at * shape.dim;
        if let Some(Storage::Host(floats)) = &mut self.storage {
            floats[place..][..shape.dim].copy_from_slice(key);
            floats[place + BLOCK * shape.dim..][..shape.dim].copy_from_slice(value);
        }
    }

    /// A block of its own with the same numbers. None when the pool has none left.
    #[must_use]
    pub fn copied(&self) -> Option<Arc<Self>> {
        let mut copy = self.pool.take()?;
        match (&mut Arc::get_mut(&mut copy)?.storage, self.storage()) {
            (Some(Storage::Host(to)), Storage::Host(from)) => to.copy_from_slice(from),
            (Some(Storage::Device(to, to_at)), Storage::Device(from, from_at)) => {
                let driver = from.gpu().driver();
                let to = to.address() + *to_at as u64;
                let from = from.address() + *from_at as u64;
                let copied = driver.copy(to, from, self.pool.block_bytes());
                if let Err(error) = copied {
                    tracing::error!(%error, "a block of keys and values could not be copied");
                    return None;
                }
            }
            _ => unreachable!("the blocks of a pool are in one place"),
        }
        Some(copy)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let storage = self.storage.take();
        let mut shelf = self.pool.shelf();
        shelf.out -= 1;
        // beyond a bound somebody else counts on the memory; without one nobody does, but to ask a device for it takes long
        let wanted = shelf.capacity < usize::MAX || self.pool.gpu.is_some();
        if wanted && shelf.out + shelf.spare.len() < shelf.capacity {
            shelf.spare.extend(storage);
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
    fn blocks_of_a_slab_on_a_device_are_apart_and_are_copied_whole() {
        let Some(gpu) = crate::gpu::emulated::emulated_gpu() else {
            return;
        };
        let pool = KvPool::on_device(pool().shape(), KvNumbers::F32, &gpu);
        pool.set_capacity(3);
        let blocks: Vec<_> = (0..2).map(|_| pool.take().unwrap()).collect();
        for (mark, block) in blocks.iter().enumerate() {
            let floats = vec![mark as f32 + 1.0; pool.shape().block_floats()];
            let bytes = bytemuck::cast_slice(&floats);
            gpu.driver().upload(block.address(), bytes).unwrap();
        }
        let copy = blocks[1].copied().unwrap();
        assert!(pool.take().is_none(), "all are out");
        for (block, mark) in blocks.iter().chain([&copy]).zip([1.0, 2.0, 2.0]) {
            let expected = vec![mark; BLOCK * 4];
            assert_eq!(block.both(1, 2), [expected.clone(), expected]);
        }
        let slab = blocks[0].address()..blocks[0].address() + SLAB as u64;
        drop((blocks, copy));
        let again = pool.take().unwrap();
        assert!(slab.contains(&again.address()), "memory is asked for once");
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
