//! Steps on a device, recorded and not.

use super::*;
use crate::gpu::emulated::emulated_gpu;
use crate::model::open;
use crate::parallel::Solo;
use std::path::Path;

#[test]
fn steps_with_experts_are_recorded_and_give_what_they_give_unrecorded() {
    const STEPS: u32 = 5;
    let Some(gpu) = emulated_gpu() else { return };
    for name in ["qwen3_5_moe_vl", "qwen3_next_moe"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/fixtures/models")
            .join(name);
        let options = LoadOptions {
            places: vec![Place::Gpu(gpu.clone())],
            ..LoadOptions::cpu()
        };
        let (config, weights) = open(&folder, &options, Arc::new(Solo), &|_| {}).unwrap();
        let model = Qwen3_5ForCausalLm::load(config, &weights, &options).unwrap();
        for sequences in [1, 3] {
            let mut ways: Vec<Vec<SequenceState>> = (0..2)
                .map(|_| (0..sequences).map(|_| model.new_state()).collect())
                .collect();
            let before = model.graphs.recorded();
            for step in 0..STEPS {
                let mut batch = Batch::default();
                for sequence in 0..sequences {
                    let token = 37 * step + 101 * sequence as u32 + 5;
                    batch.push(sequence, &[token], LogitRows::Last);
                }
                let [recorded, plain] = [0, 1].map(|way| {
                    let mut states: Vec<&mut SequenceState> = ways[way].iter_mut().collect();
                    let logits = match way {
                        0 => model.forward(&batch, &mut states),
                        _ => model.forward_probed(&batch, &mut states, &mut |_, _| {}),
                    };
                    logits.unwrap().to_vec2::<f32>().unwrap()
                });
                assert_eq!(recorded, plain, "{name}, step {step} of {sequences}");
            }
            assert_eq!(model.graphs.recorded(), before + 1, "{name}, {sequences}");
        }
    }
}
