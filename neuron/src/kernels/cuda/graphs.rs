//! Steps that come again and again in one shape are recorded once and then replayed: a replay costs the processor one call,
//! where a step costs some hundreds.

use super::DeviceRows;
use super::step::{Shape, Step};
use crate::gpu::{Address, Gpu, Graph};
use candle_core::Result;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Rows of a step that is worth recording: with more, the work is longer than the launches.
pub(crate) const MOST_ROWS: usize = 64;
/// Recordings that are kept; then all are let go, and begun anew.
const KEPT: usize = 256;

/// What has been recorded of a model. Tables and results lie at the same places whenever a step of the same shape is done,
/// so that a shape is all that has to be looked at.
#[derive(Debug, Default)]
pub(crate) struct Graphs(Mutex<Recordings>);

#[derive(Debug, Default)]
struct Recordings {
    /// Steps that have been done. The first time the workspace grows to what such a step needs, and libraries make their
    /// choices; the second time it is recorded.
    done: HashMap<Key, Option<Recording>>,
    /// The device that holds them.
    gpu: Option<Gpu>,
}

impl Recordings {
    fn clear(&mut self) {
        for recording in self.done.drain().filter_map(|(_, recording)| recording) {
            if let Some(gpu) = &self.gpu {
                gpu.driver().forget(recording.graph);
            }
        }
    }
}

impl Drop for Recordings {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Where a step's tables are, and its shape.
type Key = (Address, Shape);

/// A recorded step, and where it leaves its result.
#[derive(Debug, Clone, Copy)]
struct Recording {
    graph: Graph,
    result: Address,
    numbers: usize,
}

impl Graphs {
    /// The numbers that `work` gives for `step`. It has to do the same for every step of the same shape but for what is in the
    /// step's tables, and may not wait for the device.
    pub(crate) fn run(
        &self,
        step: &Step,
        mut work: impl FnMut() -> Result<DeviceRows>,
    ) -> Result<Vec<f32>> {
        let driver = step.gpu().driver();
        let key = (step.address(), step.shape);
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.gpu.get_or_insert_with(|| step.gpu().clone());
        let recording = match held.done.get(&key).copied() {
            None => {
                let result = work()?.numbers()?;
                if held.done.len() >= KEPT {
                    held.clear();
                }
                held.done.insert(key, None);
                return Ok(result);
            }
            Some(None) => {
                driver.begin_recording()?;
                let result = work();
                let graph = driver.end_recording(); // whatever became of the work
                let (Ok(result), Ok(graph)) = (result, graph) else {
                    // the workspace had to grow, which cannot be recorded; it has by the time it is tried again
                    return Ok(work()?.numbers()?);
                };
                // the rows go back to the workspace: each replay writes them anew, and they are read at once
                let recording = Recording {
                    graph,
                    result: result.address(),
                    numbers: result.count() * result.width(),
                };
                held.done.insert(key, Some(recording));
                recording
            }
            Some(Some(recording)) => recording,
        };
        driver.replay(recording.graph)?;
        let mut found = vec![0.0f32; recording.numbers];
        driver.download(recording.result, bytemuck::cast_slice_mut(&mut found))?;
        Ok(found)
    }
}

#[cfg(test)]
impl Graphs {
    /// How many steps have been recorded.
    pub(crate) fn recorded(&self) -> usize {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.done.values().flatten().count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::emulated::emulated_gpu;
    use crate::kernels::cuda::ops;
    use crate::kernels::cuda::step::StepMemory;
    use crate::model::{Batch, LogitRows};

    #[test]
    fn what_cannot_be_recorded_is_done_and_recorded_later() {
        let Some(gpu) = emulated_gpu() else { return };
        let batch = Batch::single(&[1], LogitRows::None);
        let step = |memory: &StepMemory| {
            let mut batch = batch.clone();
            batch.segments.clear();
            Step::new(&gpu, memory, &batch, &[], &[], None).unwrap()
        };
        let (memory, graphs) = (StepMemory::default(), Graphs::default());
        let input = DeviceRows::of(&gpu, &[2.0, 3.0], 2).unwrap();
        let mut done = Vec::new();
        for round in 0..5u8 {
            input.write(&[f32::from(round), 3.0]).unwrap();
            let mut works = 0;
            let found = graphs.run(&step(&memory), || {
                works += 1;
                if round == 1 && works == 1 {
                    gpu.buffer(1)?; // not while it is recorded
                }
                Ok(ops::swiglu(&input, &input)?)
            });
            let x = f64::from(round);
            let expected = (x * x / (1.0 + (-x).exp())) as f32;
            assert!((found.unwrap()[0] - expected).abs() < 1e-5, "round {round}");
            done.push(works);
        }
        // done, tried in vain and done again, recorded, replayed
        assert_eq!(done, [1, 2, 1, 0, 0]);
    }
}
