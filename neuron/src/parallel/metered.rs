//! What ranks spend on each other: a layer around any communicator that tells Prometheus of each call.

use super::{Communicator, GroupError, OnDevices};
use crate::gpu::Address;
use candle_core::Tensor;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry,
};
use std::sync::Arc;
use std::time::Instant;

/// From less than a sum between threads takes to more than a step.
const SECONDS: [f64; 14] = [
    5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.05, 0.2, 1.0,
];

/// The families of all models.
#[derive(Debug, Clone)]
pub struct CollectiveMetrics {
    seconds: HistogramVec,
    bytes: IntCounterVec,
}

impl CollectiveMetrics {
    /// Registers the families.
    ///
    /// # Panics
    /// When they are registered twice in one registry.
    #[must_use]
    pub fn register(registry: &Registry) -> Self {
        let labels = ["model", "rank", "call"];
        let seconds = HistogramOpts::new(
            "neuron_collective_seconds",
            "What a rank's host spends in one call that joins ranks: of threads until all have come and the outcome is there; of devices until NCCL has taken it, and in `settle` until the device has done all its work.",
        );
        let seconds = HistogramVec::new(seconds.buckets(SECONDS.to_vec()), &labels)
            .expect("names and labels are valid constants");
        let bytes = Opts::new(
            "neuron_collective_bytes_total",
            "Bytes that a rank brought to calls that join ranks.",
        );
        let bytes =
            IntCounterVec::new(bytes, &labels).expect("names and labels are valid constants");
        for family in [
            Box::new(seconds.clone()) as Box<dyn prometheus::core::Collector>,
            Box::new(bytes.clone()),
        ] {
            registry
                .register(family)
                .expect("each family is registered once");
        }
        Self { seconds, bytes }
    }

    /// The families of `model`.
    #[must_use]
    pub fn of(&self, model: &str) -> ModelCollectives {
        ModelCollectives {
            model: model.to_owned(),
            all: self.clone(),
        }
    }
}

/// The families of one model.
#[derive(Debug, Clone)]
pub struct ModelCollectives {
    model: String,
    all: CollectiveMetrics,
}

impl ModelCollectives {
    /// The ranks of a group, which tell of their calls from now on.
    #[must_use]
    pub fn around(&self, group: Vec<Arc<dyn Communicator>>) -> Vec<Arc<dyn Communicator>> {
        let meter = |rank: &str, call: &str| {
            let labels = [self.model.as_str(), rank, call];
            Meter {
                seconds: self.all.seconds.with_label_values(&labels),
                bytes: self.all.bytes.with_label_values(&labels),
            }
        };
        let metered = |inner: Arc<dyn Communicator>| {
            let rank = inner.rank().to_string();
            Arc::new(Metered {
                all_reduce: meter(&rank, "all_reduce"),
                all_gather: meter(&rank, "all_gather"),
                gather: meter(&rank, "gather"),
                broadcast: meter(&rank, "broadcast"),
                settle: meter(&rank, "settle"),
                inner,
            }) as Arc<dyn Communicator>
        };
        group.into_iter().map(metered).collect()
    }
}

/// One kind of call of one rank.
#[derive(Debug)]
struct Meter {
    seconds: Histogram,
    bytes: IntCounter,
}

impl Meter {
    /// Makes a call to which the rank brings so many bytes. One that fails counts as well.
    fn of<T>(&self, bytes: usize, call: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let outcome = call();
        self.seconds.observe(began.elapsed().as_secs_f64());
        self.bytes.inc_by(bytes as u64);
        outcome
    }
}

/// A rank that tells of its calls.
#[derive(Debug)]
struct Metered {
    inner: Arc<dyn Communicator>,
    all_reduce: Meter,
    all_gather: Meter,
    gather: Meter,
    broadcast: Meter,
    settle: Meter,
}

fn bytes(part: &Tensor) -> usize {
    part.elem_count() * part.dtype().size_in_bytes()
}

impl Communicator for Metered {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_reduce(&self, part: &Tensor) -> Result<Tensor, GroupError> {
        let call = || self.inner.all_reduce(part);
        self.all_reduce.of(bytes(part), call)
    }

    fn all_gather(&self, part: &Tensor, dim: usize) -> Result<Tensor, GroupError> {
        let call = || self.inner.all_gather(part, dim);
        self.all_gather.of(bytes(part), call)
    }

    fn gather(&self, part: &Tensor, dim: usize) -> Result<Option<Tensor>, GroupError> {
        let call = || self.inner.gather(part, dim);
        self.gather.of(bytes(part), call)
    }

    fn broadcast(&self, value: &Tensor, root: usize) -> Result<Tensor, GroupError> {
        let brought = match root == self.inner.rank() {
            true => bytes(value),
            false => 0,
        };
        let call = || self.inner.broadcast(value, root);
        self.broadcast.of(brought, call)
    }

    fn abort(&self, fault: GroupError) {
        self.inner.abort(fault);
    }

    fn fault(&self) -> Option<GroupError> {
        self.inner.fault()
    }

    fn on_devices(&self) -> Option<&dyn OnDevices> {
        self.inner.on_devices().map(|_| self as &dyn OnDevices)
    }

    fn pool(&self) -> Option<&rayon::ThreadPool> {
        self.inner.pool()
    }
}

impl Metered {
    /// What it is around, where that joins what is on devices: nobody else is given this as that.
    fn devices(&self) -> &dyn OnDevices {
        self.inner.on_devices().expect("asked for before")
    }
}

impl OnDevices for Metered {
    fn all_reduce(&self, at: Address, count: usize) -> Result<(), GroupError> {
        let call = || self.devices().all_reduce(at, count);
        self.all_reduce.of(count * size_of::<f32>(), call)
    }

    fn settle(&self) -> Result<(), GroupError> {
        self.settle.of(0, || self.devices().settle())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Batch, LoadOptions, LogitRows};
    use crate::parallel::{Threads, load, settle};
    use crate::text::tokenizer::tests::fixture;
    use prometheus::proto::Metric;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    /// What is told of `family`, by the rank and the call.
    fn told<T>(registry: &Registry, family: &str, of: impl Fn(&Metric) -> T) -> Vec<(String, T)> {
        let families = registry.gather();
        let family = families.iter().find(|one| one.name() == family);
        let metrics = family.into_iter().flat_map(|one| one.get_metric());
        let mut told: Vec<_> = metrics
            .map(|metric| {
                let label = |name: &str| {
                    let labels = metric.get_label().iter();
                    let found = labels.filter(|label| label.name() == name);
                    found.map(|label| label.value().to_owned()).collect()
                };
                let name: [String; 3] = ["model", "rank", "call"].map(label);
                (name.join(" "), of(metric))
            })
            .collect();
        told.sort_by(|(one, _), (other, _)| one.cmp(other));
        told
    }

    fn calls(registry: &Registry) -> Vec<(String, u64)> {
        let count = |metric: &Metric| metric.get_histogram().get_sample_count();
        let all = told(registry, "neuron_collective_seconds", count);
        all.into_iter().filter(|(_, count)| *count > 0).collect()
    }

    fn brought(registry: &Registry, name: &str) -> u64 {
        let bytes = |metric: &Metric| metric.get_counter().get_value() as u64;
        let all = told(registry, "neuron_collective_bytes_total", bytes);
        all.into_iter().find(|(found, _)| found == name).unwrap().1
    }

    #[test]
    fn a_model_in_ranks_tells_of_what_joins_them_and_a_whole_one_of_nothing() {
        for ranks in [1, 2] {
            let registry = Registry::new();
            let metrics = CollectiveMetrics::register(&registry);
            let options = LoadOptions {
                collectives: Some(metrics.of("m")),
                ..LoadOptions::cpu()
            };
            let model = load(&fixture(), &options, ranks, &|_| {}).unwrap();
            let mut state = model.new_state();
            let step = |tokens: &[u32], state: &mut _| {
                let batch = Batch::single(tokens, LogitRows::Last);
                model.forward(&batch, &mut [state]).unwrap();
            };
            step(&[3, 4, 5], &mut state);
            let first = calls(&registry);
            if ranks == 1 {
                assert!(first.is_empty(), "{first:?}");
                continue;
            }
            let names: Vec<&str> = first.iter().map(|(name, _)| name.as_str()).collect();
            let wanted = [
                "m 0 all_reduce",
                "m 0 gather",
                "m 1 all_reduce",
                "m 1 gather",
            ];
            assert_eq!(names, wanted);
            // every rank is told of the same, and each step moves them as much
            assert_eq!(first[0].1, first[2].1);
            let bytes = brought(&registry, wanted[0]);
            let hidden = bytes / (first[0].1 * 3 * 4);
            assert_eq!(bytes, first[0].1 * 3 * hidden * 4, "three rows of f32 each");
            assert_eq!(bytes, brought(&registry, wanted[2]));
            let logits = model.vocab_size() as u64 * 4;
            let halves = [wanted[1], wanted[3]].map(|name| brought(&registry, name));
            assert_eq!(halves.iter().sum::<u64>(), logits);
            step(&[6], &mut state);
            let second = calls(&registry);
            for ((name, before), (_, after)) in first.iter().zip(&second) {
                assert_eq!(*after, 2 * before, "{name}");
            }
            let row = first[0].1 * hidden * 4;
            assert_eq!(brought(&registry, wanted[0]), bytes + row, "one row");
            let seconds = |metric: &Metric| metric.get_histogram().get_sample_sum();
            let seconds = told(&registry, "neuron_collective_seconds", seconds);
            let spent: f64 = seconds.iter().map(|(_, seconds)| seconds).sum();
            assert!(spent > 0.0);
        }
    }

    /// Ranks whose sums are taken on devices, which are counted and not made.
    #[derive(Debug)]
    struct Counted {
        host: Threads,
        sums: AtomicUsize,
        waits: AtomicUsize,
    }

    impl OnDevices for Counted {
        fn all_reduce(&self, _: Address, count: usize) -> Result<(), GroupError> {
            self.sums.fetch_add(count, Ordering::SeqCst);
            Ok(())
        }

        fn settle(&self) -> Result<(), GroupError> {
            self.waits.fetch_add(1, Ordering::SeqCst);
            Err(GroupError::Ended { rank: 0 })
        }
    }

    impl Communicator for Counted {
        joined_by_host!();
    }

    #[test]
    fn what_is_joined_on_devices_is_told_of_as_well() {
        let registry = Registry::new();
        let metrics = CollectiveMetrics::register(&registry);
        let host = Threads::group(1, Duration::from_secs(60))
            .unwrap()
            .remove(0);
        let counted = Arc::new(Counted {
            host,
            sums: AtomicUsize::new(0),
            waits: AtomicUsize::new(0),
        });
        let group = metrics.of("m").around(vec![counted.clone()]);
        let devices = group[0].on_devices().expect("the one inside has them");
        devices.all_reduce(256, 10).unwrap();
        devices.all_reduce(256, 5).unwrap();
        let settled = settle(&*group[0]);
        assert_eq!(settled, Err(GroupError::Ended { rank: 0 }), "as the inner");
        let inner = (&counted.sums, &counted.waits);
        let inner = (
            inner.0.load(Ordering::SeqCst),
            inner.1.load(Ordering::SeqCst),
        );
        assert_eq!(inner, (15, 1));
        let expected = [
            ("m 0 all_reduce".to_owned(), 2),
            ("m 0 settle".to_owned(), 1),
        ];
        assert_eq!(calls(&registry), expected);
        assert_eq!(brought(&registry, "m 0 all_reduce"), 60);
    }
}
