//! Steps that come again and again in one shape are recorded once and then replayed: a replay costs the processor one call,
//! where a step costs some hundreds.

use super::DeviceRows;
use super::step::{Shape, Step};
use crate::gpu::{Address, Graph};
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
pub(crate) struct Graphs(Mutex<HashMap<Key, Stage>>);

/// Where a step's tables are, its shape, and the kind of its work.
type Key = (Address, Shape, Option<usize>);

#[derive(Debug, Clone, Copy)]
enum Stage {
    /// Done once: the workspace is as large as such a step needs, and libraries have made their choices.
    Done,
    /// Recorded, with the place of the result.
    Recorded {
        graph: Graph,
        result: Address,
        numbers: usize,
    },
}

impl Graphs {
    /// The numbers that `work` gives for `step`; `kind` tells several works apart. It has to do the same for every step of the same shape but for what is in
    /// the step's tables, and may not wait for the device.
    pub(crate) fn run(
        &self,
        step: &Step,
        kind: Option<usize>,
        work: impl FnOnce() -> Result<DeviceRows>,
    ) -> Result<Vec<f32>> {
        let driver = step.gpu().driver();
        let key = (step.address(), step.shape, kind);
        let mut stages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let stage = match stages.get(&key).copied() {
            None => {
                let result = work()?.numbers()?;
                if stages.len() >= KEPT {
                    for (_, stage) in stages.drain() {
                        if let Stage::Recorded { graph, .. } = stage {
                            driver.forget(graph);
                        }
                    }
                }
                stages.insert(key, Stage::Done);
                return Ok(result);
            }
            Some(Stage::Done) => {
                driver.begin_recording()?;
                let result = work();
                let graph = driver.end_recording(); // whatever became of the work
                let (result, graph) = (result?, graph?);
                let numbers = result.count() * result.width();
                // the rows go back to the workspace: each replay writes them anew, and they are read at once
                Stage::Recorded {
                    graph,
                    result: result.address(),
                    numbers,
                }
            }
            Some(recorded) => recorded,
        };
        stages.insert(key, stage);
        let Stage::Recorded {
            graph,
            result,
            numbers,
        } = stage
        else {
            unreachable!("it has just been recorded");
        };
        driver.replay(graph)?;
        let mut found = vec![0.0f32; numbers];
        driver.download(result, bytemuck::cast_slice_mut(&mut found))?;
        Ok(found)
    }
}
