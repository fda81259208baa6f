//! What the gated delta nets of a model remember of one sequence, on a device.

use super::Remembered;
use crate::gpu::{Address, Buffer, Gpu, GpuError};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where one layer's state is in a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DeltaPlace {
    /// Numbers before it: first its convolution's tail, `(taps - 1, channels)`, then `S`, `(value heads, key dim, value dim)`.
    pub(crate) offset: usize,
    /// Numbers of the tail.
    pub(crate) tail: usize,
    /// Numbers of `S`.
    pub(crate) state: usize,
    /// Channels of the convolution.
    pub(crate) channels: usize,
    /// Numbers that earlier layers have in a trail, as so many for each row and so many once.
    earlier: (usize, usize),
}

impl DeltaPlace {
    /// The place behind those so far.
    pub(crate) fn after(places: &[Self], tail: usize, state: usize, channels: usize) -> Self {
        let (offset, earlier) = places.last().map_or((0, (0, 0)), |last| {
            let (rows, once) = last.earlier;
            let earlier = (rows + last.channels + last.state, once + last.tail);
            (last.offset + last.tail + last.state, earlier)
        });
        Self {
            offset,
            tail,
            state,
            channels,
            earlier,
        }
    }

    /// Where the layer begins in a trail for `rows` rows: its convolution's tail before the step and then its inputs, and
    /// behind them `S` after each row but the last.
    pub(crate) fn trail_offset(&self, rows: usize) -> usize {
        rows * self.earlier.0 + self.earlier.1
    }
}

/// Slots that are kept for those who come next; the memory of others goes back, as others may have been promised it.
const MOST_SPARE: usize = 2;

/// Where slots come from. Copies are handles of the same.
#[derive(Debug, Clone)]
pub(crate) struct SlotPool {
    gpu: Gpu,
    places: Arc<[DeltaPlace]>,
    /// Memory of slots that came back.
    spare: Arc<Mutex<Vec<Buffer>>>,
    trails: Arc<Trails>,
}

/// The memory of trails, in use or for the next: no more than were in use at once.
#[derive(Debug, Default)]
struct Trails {
    spare: Mutex<Vec<Buffer>>,
    bytes: AtomicUsize,
}

impl Trails {
    fn spare(&self) -> MutexGuard<'_, Vec<Buffer>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory for a trail: some that came back and is large enough, or else new, for which what is too small makes room.
    fn take(&self, gpu: &Gpu, bytes: usize) -> Result<Buffer, GpuError> {
        let mut spare = self.spare();
        if let Some(at) = spare.iter().position(|spare| spare.bytes() >= bytes) {
            return Ok(spare.swap_remove(at));
        }
        self.free(spare.pop());
        let buffer = gpu.buffer(bytes)?;
        self.bytes.fetch_add(buffer.bytes(), Ordering::Relaxed);
        Ok(buffer)
    }

    fn free(&self, buffers: impl IntoIterator<Item = Buffer>) {
        for buffer in buffers {
            self.bytes.fetch_sub(buffer.bytes(), Ordering::Relaxed);
        }
    }
}

impl SlotPool {
    pub(crate) fn new(gpu: &Gpu, places: Vec<DeltaPlace>) -> Self {
        Self {
            gpu: gpu.clone(),
            places: places.into(),
            spare: Arc::default(),
            trails: Arc::default(),
        }
    }

    /// Numbers of a trail for `rows` rows.
    fn trail_floats(&self, rows: usize) -> usize {
        self.places.last().map_or(0, |last| {
            let own = last.tail + rows * (last.channels + last.state);
            last.trail_offset(rows) + own
        })
    }

    /// Bytes of a trail for `rows` rows.
    pub(crate) fn trail_bytes(&self, rows: usize) -> usize {
        4 * self.trail_floats(rows)
    }

    /// Bytes of all trails, those that are kept for the next step included.
    pub(crate) fn trails_held(&self) -> u64 {
        self.trails.bytes.load(Ordering::Relaxed) as u64
    }

    /// Gives back the memory of trails that is kept for the next step.
    pub(crate) fn free_trails(&self) {
        let spare = std::mem::take(&mut *self.trails.spare());
        self.trails.free(spare);
    }

    /// Numbers in a slot.
    fn floats(&self) -> usize {
        let last = self.places.last();
        last.map_or(0, |last| last.offset + last.tail + last.state)
    }

    fn spare(&self) -> MutexGuard<'_, Vec<Buffer>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn memory(&self) -> Result<Buffer, GpuError> {
        let spare = self.spare().pop();
        spare.map_or_else(|| self.gpu.buffer(4 * self.floats()), Ok)
    }

    /// Keeps memory that a slot had, if it is of use.
    fn take_back(&self, memory: Option<Result<Memory, GpuError>>) {
        if let Some(Ok(Memory::Device(buffer))) = memory {
            let mut spare = self.spare();
            if spare.len() < MOST_SPARE {
                spare.push(buffer);
            }
        }
    }

    /// The state of a sequence that has not begun.
    pub(crate) fn empty(&self) -> Slot {
        let memory = self.memory().and_then(|memory| {
            let driver = self.gpu.driver();
            driver.zero(memory.address(), memory.bytes())?;
            Ok(Memory::Device(memory))
        });
        Slot {
            pool: self.clone(),
            memory: Some(memory),
            trail: None,
        }
    }
}

/// The state of all gated delta nets for one sequence. Where the device had no room for it, whoever computes with it is
/// told.
#[derive(Debug)]
pub(crate) struct Slot {
    pool: SlotPool,
    /// None only while it is dropped.
    memory: Option<Result<Memory, GpuError>>,
    trail: Option<Trail>,
}

/// Where a slot's numbers are.
#[derive(Debug)]
enum Memory {
    Device(Buffer),
    /// Moved out of the way: nothing is computed from here.
    Host(Vec<f32>),
}

/// Earlier states of a slot, for rows that may be taken back.
#[derive(Debug)]
struct Trail {
    /// None only while it is dropped.
    memory: Option<Buffer>,
    /// Rows there is room for.
    rows: usize,
    trails: Arc<Trails>,
}

impl Trail {
    fn address(&self) -> Address {
        self.memory.as_ref().map_or(0, Buffer::address)
    }
}

impl Drop for Trail {
    fn drop(&mut self) {
        self.trails.spare().extend(self.memory.take());
    }
}

impl Slot {
    fn memory(&self) -> Result<&Memory, GpuError> {
        let memory = self.memory.as_ref().expect("it is there until the end");
        memory.as_ref().map_err(Clone::clone)
    }

    /// Its memory on the device, of one that sequences compute with.
    fn buffer(&self) -> Result<&Buffer, GpuError> {
        match self.memory()? {
            Memory::Device(buffer) => Ok(buffer),
            Memory::Host(_) => {
                unreachable!("a copy is computed with, and copies are on the device")
            }
        }
    }

    /// Whether there was room for it.
    pub(crate) fn is_whole(&self) -> bool {
        self.memory().is_ok()
    }

    /// Moves the numbers to the host. False where they are there, or the device fails.
    pub(crate) fn move_to_host(&mut self) -> bool {
        let Ok(Memory::Device(buffer)) = self.memory() else {
            return false;
        };
        let Ok(numbers) = buffer.read(0, self.floats()) else {
            return false;
        };
        let before = self.memory.replace(Ok(Memory::Host(numbers)));
        self.pool.take_back(before);
        true
    }

    /// Where it is.
    pub(crate) fn address(&self) -> Result<Address, GpuError> {
        self.buffer().map(Buffer::address)
    }

    /// Where its trail is; 0 where it has none.
    pub(crate) fn trail_address(&self) -> Address {
        self.trail.as_ref().map_or(0, Trail::address)
    }

    /// Rows its trail has room for.
    pub(crate) fn trail_rows(&self) -> usize {
        self.trail.as_ref().map_or(0, |trail| trail.rows)
    }

    /// Forgets the trail, and where a step of up to `rows` rows may be taken back, has it leave another.
    pub(crate) fn begin_trail(&mut self, rows: Option<usize>) -> Result<(), GpuError> {
        self.trail = None;
        if let Some(rows) = rows {
            let (pool, bytes) = (&self.pool, self.pool.trail_bytes(rows));
            self.trail = Some(Trail {
                memory: Some(pool.trails.take(&pool.gpu, bytes)?),
                rows,
                trails: pool.trails.clone(),
            });
        }
        Ok(())
    }

    /// Goes back to where it was after the first `rows` of the last step's `of` rows, one at least.
    pub(crate) fn keep_rows(&mut self, rows: usize, of: usize) {
        let Some(trail) = self.trail.take().filter(|_| rows < of) else {
            return;
        };
        let gone_back = self.buffer().and_then(|memory| {
            let driver = self.pool.gpu.driver();
            for place in &*self.pool.places {
                let to = memory.address() + 4 * place.offset as u64;
                let floats = place.trail_offset(trail.rows);
                let from = trail.address() + 4 * floats as u64;
                let row = 4 * (rows * place.channels) as u64;
                driver.copy(to, from + row, 4 * place.tail)?;
                let states = place.tail + of * place.channels + (rows - 1) * place.state;
                let to = to + 4 * place.tail as u64;
                driver.copy(to, from + 4 * states as u64, 4 * place.state)?;
            }
            Ok(())
        });
        if let Err(error) = gone_back {
            self.memory = Some(Err(error));
        }
    }

    /// Numbers it holds.
    pub(crate) fn floats(&self) -> usize {
        self.pool.floats()
    }

    /// What the gated delta net number `index` remembers.
    pub(crate) fn read(&self, index: usize) -> Result<Remembered, GpuError> {
        let (memory, place) = (self.buffer()?, self.pool.places[index]);
        Ok(Remembered {
            tail: memory.read(place.offset, place.tail)?,
            recurrent: memory.read(place.offset + place.tail, place.state)?,
        })
    }
}

impl Clone for Slot {
    /// A copy of the numbers on the device, without the trail.
    fn clone(&self) -> Self {
        let copied = self.memory().and_then(|from| {
            let to = self.pool.memory()?;
            let driver = self.pool.gpu.driver();
            match from {
                Memory::Device(from) => driver.copy(to.address(), from.address(), from.bytes())?,
                Memory::Host(from) => driver.upload(to.address(), bytemuck::cast_slice(from))?,
            }
            Ok(Memory::Device(to))
        });
        Self {
            pool: self.pool.clone(),
            memory: Some(copied),
            trail: None,
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let memory = self.memory.take();
        self.pool.take_back(memory);
    }
}
