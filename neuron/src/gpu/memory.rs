//! Memory of a device: what is held for long, and what results pass through.

#[cfg(feature = "cuda")]
use super::CudaDevice;
use super::{Address, Driver, GpuError};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Every place begins at a multiple of this, as kernels that read 16 bytes at once need and the driver gives.
const ALIGNMENT: usize = 256;
/// What the workspace takes from the device at once, at the least.
const PIECE: usize = 64 << 20;

/// A device with a workspace. Copies are handles of the same.
#[derive(Debug, Clone)]
pub struct Gpu(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    id: String,
    driver: Arc<dyn Driver>,
    /// The same as it is to libraries beside neuron's own kernels.
    #[cfg(feature = "nccl")]
    cuda: Option<Arc<CudaDevice>>,
    workspace: Mutex<Workspace>,
}

impl Gpu {
    /// The device behind `driver`, known to operators as `id`.
    #[must_use]
    pub fn new(id: &str, driver: Arc<dyn Driver>) -> Self {
        Self(Arc::new(Inner {
            id: id.to_owned(),
            driver,
            #[cfg(feature = "nccl")]
            cuda: None,
            workspace: Mutex::default(),
        }))
    }

    /// A CUDA device, known to operators as `id`.
    #[cfg(feature = "cuda")]
    #[must_use]
    pub fn of_cuda(id: &str, device: CudaDevice) -> Self {
        let device = Arc::new(device);
        Self(Arc::new(Inner {
            id: id.to_owned(),
            driver: device.clone(),
            #[cfg(feature = "nccl")]
            cuda: Some(device),
            workspace: Mutex::default(),
        }))
    }

    /// The CUDA device behind it, where it is one.
    #[cfg(feature = "nccl")]
    #[must_use]
    pub fn cuda(&self) -> Option<Arc<CudaDevice>> {
        self.0.cuda.clone()
    }

    /// Its name in the load call and in the discovery: `cuda:0`.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// What it does.
    #[must_use]
    pub fn driver(&self) -> &dyn Driver {
        &*self.0.driver
    }

    /// Whether both are the same device.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Memory that is held for long.
    ///
    /// # Errors
    /// When there is no room.
    pub fn buffer(&self, bytes: usize) -> Result<Buffer, GpuError> {
        let address = self.driver().allocate(bytes.max(1))?;
        Ok(Buffer {
            gpu: self.clone(),
            address,
            bytes,
        })
    }

    /// A buffer with these numbers.
    ///
    /// # Errors
    /// When there is no room.
    pub fn buffer_of<T: bytemuck::NoUninit>(&self, numbers: &[T]) -> Result<Buffer, GpuError> {
        let bytes = bytemuck::cast_slice(numbers);
        let buffer = self.buffer(bytes.len())?;
        self.driver().upload(buffer.address, bytes)?;
        Ok(buffer)
    }

    /// Memory for a result on its way. The same requests in the same order get the same places, so that recorded work
    /// can be replayed; what is given back may be handed out at once, as all work is done in order.
    ///
    /// # Errors
    /// When there is no room.
    pub fn scratch(&self, bytes: usize) -> Result<Scratch, GpuError> {
        let bytes = bytes.max(1).next_multiple_of(ALIGNMENT);
        let mut workspace = self.workspace();
        let address = match workspace.take(bytes) {
            Some(address) => address,
            None => {
                let (address, piece) = match self.driver().allocate(bytes.max(PIECE)) {
                    Ok(address) => (address, bytes.max(PIECE)),
                    // there is not as much left, but what is needed may be
                    Err(GpuError::OutOfMemory { .. }) => (self.driver().allocate(bytes)?, bytes),
                    Err(error) => return Err(error),
                };
                workspace.add(address, piece);
                workspace.take(bytes).expect("the piece is large enough")
            }
        };
        Ok(Scratch {
            gpu: self.clone(),
            address,
            bytes,
        })
    }

    fn workspace(&self) -> MutexGuard<'_, Workspace> {
        // nothing under this lock can panic half-way
        let workspace = self.0.workspace.lock();
        workspace.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let workspace = self.workspace.get_mut();
        let workspace = workspace.unwrap_or_else(PoisonError::into_inner);
        for piece in &workspace.pieces {
            self.driver.release(*piece);
        }
    }
}

/// Memory that is held for long; given back when it is dropped.
#[derive(Debug)]
pub struct Buffer {
    gpu: Gpu,
    address: Address,
    bytes: usize,
}

impl Buffer {
    /// Where it is.
    #[must_use]
    pub fn address(&self) -> Address {
        self.address
    }

    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The device it is on.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// A buffer of its own with the same bytes.
    ///
    /// # Errors
    /// When there is no room.
    pub fn copied(&self) -> Result<Self, GpuError> {
        let copy = self.gpu.buffer(self.bytes)?;
        self.gpu
            .driver()
            .copy(copy.address, self.address, self.bytes)?;
        Ok(copy)
    }

    /// `count` numbers from number `first` on.
    ///
    /// # Errors
    /// When the device fails.
    pub fn read<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(
        &self,
        first: usize,
        count: usize,
    ) -> Result<Vec<T>, GpuError> {
        assert!((first + count) * size_of::<T>() <= self.bytes, "inside");
        let mut numbers = vec![T::zeroed(); count];
        let from = self.address + (first * size_of::<T>()) as u64;
        let bytes = bytemuck::cast_slice_mut(&mut numbers);
        self.gpu.driver().download(from, bytes)?;
        Ok(numbers)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.gpu.driver().release(self.address);
    }
}

/// Memory for a result on its way; goes back to the workspace when it is dropped.
#[derive(Debug)]
pub struct Scratch {
    gpu: Gpu,
    address: Address,
    bytes: usize,
}

impl Scratch {
    /// Where it is.
    #[must_use]
    pub fn address(&self) -> Address {
        self.address
    }

    /// The device it is on.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.gpu.workspace().give_back(self.address, self.bytes);
    }
}

/// Memory of the device that results pass through. It grows as it is needed and is kept.
#[derive(Debug, Default)]
struct Workspace {
    /// Where the pieces that the device gave begin.
    pieces: BTreeSet<Address>,
    /// What nobody has: where it begins, and its bytes.
    free: BTreeMap<Address, usize>,
}

impl Workspace {
    fn add(&mut self, piece: Address, bytes: usize) {
        self.pieces.insert(piece);
        self.free.insert(piece, bytes);
    }

    /// The first place that is large enough.
    fn take(&mut self, bytes: usize) -> Option<Address> {
        let (address, found) = self.free.iter().find(|(_, free)| **free >= bytes)?;
        let (address, found) = (*address, *found);
        self.free.remove(&address);
        if found > bytes {
            self.free.insert(address + bytes as u64, found - bytes);
        }
        Some(address)
    }

    fn give_back(&mut self, address: Address, mut bytes: usize) {
        let end = address + bytes as u64;
        // two pieces may lie side by side, and are two all the same
        if !self.pieces.contains(&end) {
            bytes += self.free.remove(&end).unwrap_or(0);
        }
        let before = self.free.range_mut(..address).next_back();
        match before {
            Some((start, free))
                if *start + *free as u64 == address && !self.pieces.contains(&address) =>
            {
                *free += bytes;
            }
            _ => {
                self.free.insert(address, bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    #[test]
    fn places_do_not_overlap_and_come_back_whole() {
        let mut workspace = Workspace::default();
        let pieces = [(1024, 4096), (1024 + 4096, 2048), (1 << 20, 1024)]; // the first two side by side
        for (address, bytes) in pieces {
            workspace.add(address, bytes);
        }
        let whole = workspace.free.clone();
        let mut random = StdRng::seed_from_u64(1);
        let mut held: Vec<(Address, usize)> = Vec::new();
        for _ in 0..2000 {
            let bytes = random.random_range(1..=8) * ALIGNMENT;
            match random.random_bool(0.5).then(|| workspace.take(bytes)) {
                Some(Some(address)) => {
                    let end = address + bytes as u64;
                    let inside = |(from, size): &(Address, usize)| {
                        *from <= address && end <= *from + *size as u64
                    };
                    assert!(pieces.iter().any(inside), "across two pieces");
                    let apart = |(from, size): &(Address, usize)| {
                        end <= *from || *from + *size as u64 <= address
                    };
                    assert!(held.iter().all(apart));
                    held.push((address, bytes));
                }
                Some(None) => {}
                None if held.is_empty() => {}
                None => {
                    let at = random.random_range(0..held.len());
                    let (address, bytes) = held.swap_remove(at);
                    workspace.give_back(address, bytes);
                }
            }
        }
        for (address, bytes) in held {
            workspace.give_back(address, bytes);
        }
        assert_eq!(workspace.free, whole);
    }
}
