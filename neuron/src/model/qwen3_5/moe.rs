//! The feed-forward block with experts.

use super::config::{Config, Experts};
use super::mlp::Mlp;
use super::{Pass, Seen};
use crate::gpu::{Gpu, GpuError};
use crate::kernels::cuda::experts::{self, ExpertMatrices, Meets, Route};
use crate::kernels::cuda::{DeviceMatrix, DeviceRows, ops};
use crate::kernels::rows::{Place, Rows};
use crate::kernels::{add_scaled, sigmoid, with_f32};
use crate::model::LoadError;
use crate::model::layers::linear::ReplicatedLinear;
use crate::parallel::{Communicator, all_reduce, brought};
use crate::weights::Weights;
use candle_core::{Result, Tensor};
use std::sync::Arc;

/// A few experts for each token, and one for all (Qwen3_5MoeSparseMoeBlock). Every rank routes every token and holds a
/// part of the width of every expert.
///
/// On a device a step of few rows is routed there; of more rows the router's logits are brought to the host, which asks for one
/// expert after another.
#[derive(Debug)]
pub(super) struct SparseMoeBlock {
    gate: ReplicatedLinear,
    experts: Vec<Mlp>,
    /// The same for a device that chooses, where it can.
    chosen: Option<Chosen>,
    shared_expert: Mlp,
    shared_expert_gate: ReplicatedLinear,
    per_token: usize,
    norm_topk_prob: bool,
    communicator: Arc<dyn Communicator>,
}

/// The matrices of all experts, of which a device takes those it has chosen.
#[derive(Debug)]
struct Chosen {
    /// Gates, and then what they are for.
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
}

/// A token at an expert.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Visit {
    row: usize,
    weight: f32,
}

impl SparseMoeBlock {
    pub(super) fn load(
        config: &Config,
        sizes: Experts,
        weights: &Weights<'_>,
    ) -> std::result::Result<Self, LoadError> {
        let hidden = config.hidden_size;
        let expert = |index| {
            let weights = weights.pp("experts").pp(index);
            Mlp::load(config, sizes.moe_intermediate_size, &weights)
        };
        let gate = ReplicatedLinear::load(weights, "gate", sizes.num_experts, hidden)?;
        let experts = (0..sizes.num_experts)
            .map(expert)
            .collect::<std::result::Result<Vec<_>, _>>()?;
        Ok(Self {
            gate,
            chosen: match weights.place() {
                Place::Gpu(gpu) => Chosen::new(gpu, &experts, sizes.num_experts_per_tok)?,
                Place::Cpu => None,
            },
            experts,
            shared_expert: Mlp::load(
                config,
                sizes.shared_expert_intermediate_size,
                &weights.pp("shared_expert"),
            )?,
            shared_expert_gate: ReplicatedLinear::load(weights, "shared_expert_gate", 1, hidden)?,
            per_token: sizes.num_experts_per_tok,
            norm_topk_prob: sizes.norm_topk_prob,
            communicator: weights.communicator(),
        })
    }

    /// (t, hidden) → (t, hidden); `layer` is shown to the probe with the router's logits.
    pub(super) fn forward(&self, x: &Rows, layer: usize, pass: &mut Pass<'_, '_>) -> Result<Rows> {
        let logits = self.gate.forward(x)?; // (t, experts)
        pass.show(Seen::Router(layer), &logits, &*self.communicator)?;
        // Σ weight · expert(x)  +  sigmoid(shared_expert_gate x) · shared_expert(x)
        let shared = self.shared_expert.partial(x)?; // (t, hidden)
        let gates = self.shared_expert_gate.forward(x)?; // (t, 1)
        let sum = match (x, &shared, &gates) {
            (Rows::Host(x), Rows::Host(shared), Rows::Host(gates)) => {
                Rows::Host(self.sum(x, shared, gates, &self.route(&logits)?)?)
            }
            (Rows::Device(x), Rows::Device(shared), Rows::Device(gates)) => {
                match (&self.chosen, &logits) {
                    (Some(chosen), Rows::Device(logits)) if x.count() <= experts::MOST_ROWS => {
                        let route = Route::new(logits, self.per_token, self.norm_topk_prob)?;
                        chosen.sum(x, shared, gates, &route)?;
                    }
                    _ => self.sum_on_device(x, shared, gates, &self.route(&logits)?)?,
                }
                Rows::Device(shared.clone())
            }
            _ => unreachable!("projections of the same rows are in the same place"),
        };
        all_reduce(&*self.communicator, sum)
    }

    fn sum(
        &self,
        x: &Tensor,
        shared: &Tensor,
        gates: &Tensor,
        visits: &[Vec<Visit>],
    ) -> Result<Tensor> {
        let (_, hidden) = x.dims2()?;
        let mut sum = with_f32(shared, <[f32]>::to_vec)?;
        with_f32(gates, |gates| {
            for (row, gate) in sum.chunks_exact_mut(hidden).zip(gates) {
                let gate = sigmoid(*gate);
                row.iter_mut().for_each(|x| *x *= gate);
            }
        })?;
        for (expert, visits) in self.visited(visits) {
            let own = with_f32(x, |x| {
                let rows = visits
                    .iter()
                    .map(|visit| &x[visit.row * hidden..][..hidden]);
                rows.flatten().copied().collect::<Vec<f32>>()
            })?;
            let own = Rows::Host(Tensor::from_vec(own, (visits.len(), hidden), x.device())?);
            with_f32(&expert.partial(&own)?.tensor()?, |out| {
                for (visit, out) in visits.iter().zip(out.chunks_exact(hidden)) {
                    add_scaled(&mut sum[visit.row * hidden..][..hidden], visit.weight, out);
                }
            })?;
        }
        Tensor::from_vec(sum, x.shape(), x.device())
    }

    /// As [`Self::sum`], into `shared`.
    fn sum_on_device(
        &self,
        x: &DeviceRows,
        shared: &DeviceRows,
        gates: &DeviceRows,
        visits: &[Vec<Visit>],
    ) -> Result<()> {
        ops::scale_by_sigmoid(shared, gates)?;
        for (expert, visits) in self.visited(visits) {
            let rows: Vec<i32> = visits.iter().map(|visit| visit.row as i32).collect();
            let weights: Vec<f32> = visits.iter().map(|visit| visit.weight).collect();
            let own = Rows::Device(ops::gather_rows(x, &rows)?);
            if let Rows::Device(out) = expert.partial(&own)? {
                ops::scatter_add(shared, &out, &rows, &weights)?;
            }
        }
        Ok(())
    }

    /// The experts that any row goes to.
    fn visited<'a>(
        &'a self,
        visits: &'a [Vec<Visit>],
    ) -> impl Iterator<Item = (&'a Mlp, &'a Vec<Visit>)> {
        let all = self.experts.iter().zip(visits);
        all.filter(|(_, visits)| !visits.is_empty())
    }

    /// The rows that go to each expert, from `(t, experts)` logits.
    fn route(&self, logits: &Rows) -> Result<Vec<Vec<Visit>>> {
        let count = self.experts.len();
        let mut visits = vec![Vec::new(); count];
        with_f32(&brought(&*self.communicator, logits)?, |logits| {
            for (row, logits) in logits.chunks_exact(count).enumerate() {
                for (expert, weight) in choose(logits, self.per_token, self.norm_topk_prob) {
                    visits[expert].push(Visit { row, weight });
                }
            }
        })?;
        Ok(visits)
    }

    /// Bytes of the experts that a step of so many rows leaves alone, if rows choose with no preference.
    pub(super) fn idle_bytes(&self, rows: usize) -> u64 {
        let all: u64 = self.experts.iter().map(Mlp::bytes).sum();
        let chosen = self.per_token as f64 / self.experts.len() as f64;
        (all as f64 * (1.0 - chosen).powf(rows as f64)) as u64
    }

    /// Whether the host has a part even in steps of few rows, where they are on a device.
    pub(super) fn needs_host(&self) -> bool {
        self.chosen.is_none()
    }
}

impl Chosen {
    /// None where the device does not choose among so many, or loading has failed.
    fn new(
        gpu: &Gpu,
        all: &[Mlp],
        per_token: usize,
    ) -> std::result::Result<Option<Self>, GpuError> {
        let matrices: Option<Vec<[&DeviceMatrix; 3]>> = all.iter().map(Mlp::on_device).collect();
        let Some(matrices) = matrices.filter(|_| experts::can_route(all.len(), per_token)) else {
            return Ok(None);
        };
        let part = |part: usize| -> Vec<DeviceMatrix> {
            let of_part = matrices.iter().map(|of_expert| of_expert[part].clone());
            of_part.collect()
        };
        Ok(Some(Self {
            gate_up: ExpertMatrices::new(gpu, &[part(0), part(1)])?,
            down: ExpertMatrices::new(gpu, &[part(2)])?,
        }))
    }

    /// As [`SparseMoeBlock::sum`], into `shared`.
    fn sum(
        &self,
        x: &DeviceRows,
        shared: &DeviceRows,
        gates: &DeviceRows,
        route: &Route,
    ) -> Result<()> {
        let gate_up = self.gate_up.multiply(x, Meets::Rows, route)?; // (2 · visits, own width)
        let gated = ops::swiglu_of_halves(&gate_up)?; // (visits, own width)
        let products = self.down.multiply(&gated, Meets::Visits, route)?; // (visits, hidden)
        Ok(route.combine(shared, gates, &products)?)
    }
}

/// The `count` likeliest experts with their weights: softmax over all, and where `normed` divided by their sum.
fn choose(logits: &[f32], count: usize, normed: bool) -> Vec<(usize, f32)> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut weights: Vec<(usize, f32)> = logits
        .iter()
        .map(|logit| (logit - top).exp())
        .enumerate()
        .collect();
    let all: f32 = weights.iter().map(|(_, weight)| weight).sum();
    // of equals the first, as the reference has it
    weights.sort_by(|a, b| b.1.total_cmp(&a.1));
    weights.truncate(count);
    let chosen: f32 = weights.iter().map(|(_, weight)| weight).sum();
    let divisor = if normed { chosen } else { all };
    for (_, weight) in &mut weights {
        *weight /= divisor;
    }
    weights
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_experts_are_chosen_and_weighed() {
        let logits = [0.0, 2f32.ln(), 1f32.ln(), 4f32.ln()]; // weights 1, 2, 1, 4 of 8
        let near = |found: Vec<(usize, f32)>, expected: [(usize, f32); 3]| {
            for ((expert, weight), expected) in found.iter().zip(expected) {
                assert_eq!(*expert, expected.0, "{found:?}");
                assert!((weight - expected.1).abs() < 1e-6, "{found:?}");
            }
        };
        near(choose(&logits, 3, false), [(3, 0.5), (1, 0.25), (0, 0.125)]);
        near(
            choose(&logits, 3, true),
            [(3, 4.0 / 7.0), (1, 2.0 / 7.0), (0, 1.0 / 7.0)],
        );
        near(choose(&[-1e30, 3.0, 900.0], 1, false), [(2, 1.0); 3]);
    }
}
