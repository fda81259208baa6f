//! Memory of the host that a device can copy from and to while the host goes on.

// Foreign functions, and memory that they give.
#![allow(unsafe_code)]

use super::library::driver;
use super::{Address, GpuError};
use cudarc::driver::sys;
use std::ffi::c_void;
use std::ptr::null_mut;

/// Bytes of one buffer: many of a step's small uploads fit into one, and a large copy still overlaps with filling it.
const SIZE: usize = 4 << 20;
/// Buffers that uploads go through in turn.
const BUFFERS: usize = 8;
/// Where in a buffer the next upload may begin.
const BOUNDARY: usize = 256;

/// A mark in a stream, to wait for.
#[derive(Debug)]
struct Event(sys::CUevent);

impl Event {
    fn new() -> Result<Self, GpuError> {
        let mut event = null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the handle is written to a variable that is ours.
        unsafe { driver!(cuEventCreate(&raw mut event, flags)) }?;
        Ok(Self(event))
    }

    fn record(&self, stream: sys::CUstream) -> Result<(), GpuError> {
        // SAFETY: both handles are alive.
        unsafe { driver!(cuEventRecord(self.0, stream)) }
    }

    fn wait(&self) -> Result<(), GpuError> {
        // SAFETY: the handle is alive.
        unsafe { driver!(cuEventSynchronize(self.0)) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the handle is ours, and nobody has it any more.
        let _ = unsafe { driver!(cuEventDestroy_v2(self.0)) };
    }
}

/// Memory of the host that stays where it is, and the end of the device's last use of it.
#[derive(Debug)]
struct Buffer {
    memory: *mut u8,
    used: Event,
    in_use: bool,
}

impl Buffer {
    fn new() -> Result<Self, GpuError> {
        let used = Event::new()?;
        let mut memory: *mut c_void = null_mut();
        // SAFETY: the address is written to a variable that is ours.
        unsafe { driver!(cuMemHostAlloc(&raw mut memory, SIZE, 0)) }?;
        Ok(Self {
            memory: memory.cast(),
            used,
            in_use: false,
        })
    }

    /// Marks that the device uses it up to here.
    fn mark(&mut self, stream: sys::CUstream) -> Result<(), GpuError> {
        self.used.record(stream)?;
        self.in_use = true;
        Ok(())
    }

    /// Waits until the device no longer uses it.
    fn wait(&mut self) -> Result<(), GpuError> {
        if self.in_use {
            self.used.wait()?;
            self.in_use = false;
        }
        Ok(())
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: it came from the driver and is given back once; the stream that used it has come to its end.
        let _ = unsafe { driver!(cuMemFreeHost(self.memory.cast())) };
    }
}

/// Buffers for both ways. Their stream must have come to its end when they are dropped.
#[derive(Debug)]
pub(super) struct Staging {
    stream: sys::CUstream,
    up: Vec<Buffer>,
    /// The buffer of [`Self::up`] that is being filled, and how far it is.
    current: usize,
    filled: usize,
    down: [Buffer; 2],
}

// SAFETY: the driver takes its handles from any thread, and each buffer is reached through its owner alone.
unsafe impl Send for Staging {}

impl Staging {
    /// For copies on `stream`, in the current context.
    pub(super) fn new(stream: sys::CUstream) -> Result<Self, GpuError> {
        Ok(Self {
            stream,
            up: (0..BUFFERS)
                .map(|_| Buffer::new())
                .collect::<Result<_, _>>()?,
            current: 0,
            filled: 0,
            down: [Buffer::new()?, Buffer::new()?],
        })
    }

    /// Copies `bytes` to the device; they may change at return.
    pub(super) fn upload(&mut self, to: Address, mut bytes: &[u8]) -> Result<(), GpuError> {
        let mut to = to;
        while !bytes.is_empty() {
            if self.filled == SIZE {
                self.up[self.current].mark(self.stream)?;
                self.current = (self.current + 1) % BUFFERS;
                self.filled = 0;
                self.up[self.current].wait()?;
            }
            let (part, rest) = bytes.split_at(bytes.len().min(SIZE - self.filled));
            // SAFETY: `filled` is less than SIZE, the length of the buffer, and the part fits behind it. The device reads
            // nothing there: it was waited for when this round of the buffer began.
            let from = unsafe {
                let from = self.up[self.current].memory.add(self.filled);
                std::ptr::copy_nonoverlapping(part.as_ptr(), from, part.len());
                from
            };
            // SAFETY: the bytes copied from stay as they are until the stream has come past them. That the device's side
            // is memory of that length is up to the caller, as with every address.
            unsafe {
                driver!(cuMemcpyHtoDAsync_v2(
                    to,
                    from.cast(),
                    part.len(),
                    self.stream
                ))
            }?;
            self.filled = (self.filled + part.len().next_multiple_of(BOUNDARY)).min(SIZE);
            to += part.len() as u64;
            bytes = rest;
        }
        Ok(())
    }

    /// Copies to the host and waits.
    pub(super) fn download(&mut self, from: Address, bytes: &mut [u8]) -> Result<(), GpuError> {
        let mut from = from;
        let mut before: Option<(usize, &mut [u8])> = None;
        for (at, part) in bytes.chunks_mut(SIZE).enumerate() {
            let at = at % self.down.len();
            let buffer = &mut self.down[at];
            // SAFETY: the part is no longer than the buffer, which was read out two parts ago. The device's side is up
            // to the caller.
            unsafe {
                let memory = buffer.memory.cast();
                driver!(cuMemcpyDtoHAsync_v2(memory, from, part.len(), self.stream))
            }?;
            buffer.mark(self.stream)?;
            from += part.len() as u64;
            if let Some((at, part)) = before.replace((at, part)) {
                self.read_out(at, part)?;
            }
        }
        match before {
            Some((at, part)) => self.read_out(at, part),
            None => Ok(()),
        }
    }

    fn read_out(&mut self, at: usize, part: &mut [u8]) -> Result<(), GpuError> {
        let buffer = &mut self.down[at];
        buffer.wait()?;
        // SAFETY: the part is no longer than the buffer, and the device has finished with writing it.
        unsafe { std::ptr::copy_nonoverlapping(buffer.memory, part.as_mut_ptr(), part.len()) };
        Ok(())
    }
}
