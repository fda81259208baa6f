//! What a step of decoding takes from the allocator.
//!
//! Everything it takes it gives back before the next step begins, but for a block of keys and values every sixteen tokens. What there
//! is, and why it is not held instead: the product of each projection and what kernels make of it (candle's tensors own their numbers,
//! and how many rows the next step has is not known); x as kernels read it, once for all projections that share it;
//! shapes and counts of tensors, some dozen bytes each; rayon's jobs, where the pool has more than one thread. The
//! allocator hands the same few thousand bytes out again each time, from lists of the thread.

#![allow(missing_docs, clippy::unwrap_used)]

use allocation_counter::{AllocationInfo, measure};
use neuron::memory::pool::BLOCK;
use neuron::model::{self, Batch, CausalLm, LoadOptions, LogitRows};
use std::path::Path;

/// Of a step of one token, after `before` tokens.
fn steps(model: &dyn CausalLm, before: usize, steps: usize) -> Vec<AllocationInfo> {
    let mut state = model.new_state();
    let prompt: Vec<u32> = (0..before as u32).map(|at| at % 200).collect();
    let batch = Batch::single(&prompt, LogitRows::None);
    model.forward(&batch, &mut [&mut state]).unwrap();
    let step = |id: usize| {
        measure(|| {
            let batch = Batch::single(&[id as u32 % 200], LogitRows::Last);
            drop(model.forward(&batch, &mut [&mut state]).unwrap());
        })
    };
    (0..steps).map(step).collect()
}

#[test]
fn a_step_gives_back_what_it_takes_and_takes_the_same_each_time() {
    const STEPS: usize = 48;
    /// 992 of eight dense layers and 1,097 of four with experts when this was written.
    const MOST: u64 = 1_200;
    // one thread: allocations are counted where they happen
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build()
        .unwrap();
    pool.install(|| {
        for name in ["qwen3_5_text", "qwen3_5_moe_vl"] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("../tests/fixtures/models")
                .join(name);
            let model = model::load(&folder, &LoadOptions::cpu(), &|_| {}).unwrap();
            let (early, late) = (steps(&*model, 16, STEPS), steps(&*model, 160, STEPS));
            let kept = |steps: &[AllocationInfo]| -> usize {
                steps.iter().filter(|step| step.bytes_current > 0).count()
            };
            let most = |steps: &[AllocationInfo]| steps.iter().map(|s| s.count_total).max();
            let peak = |steps: &[AllocationInfo]| steps.iter().map(|s| s.bytes_max).max();
            println!(
                "{name}: {:?} a step, {:?} bytes",
                most(&early),
                peak(&early)
            );
            assert_eq!(kept(&early), STEPS / BLOCK, "{name}: only new blocks stay");
            assert_eq!(kept(&late), STEPS / BLOCK, "{name}: only new blocks stay");
            assert_eq!(most(&early), most(&late), "{name}: the longer the more");
            assert_eq!(peak(&early), peak(&late), "{name}: the longer the more");
            assert!(most(&late) <= Some(MOST), "{name}: {:?}", most(&late));
        }
    });
}
