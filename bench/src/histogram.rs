//! Durations counted in buckets, so that a percentile over millions of requests costs a few kilobytes.

use std::time::Duration;

/// Each power of two is cut into `1 << SUB_BITS` buckets: a bucket is at most 1.6 % of its value wide.
const SUB_BITS: u32 = 6;

/// Counts of durations. A quantile read from it is within 0.8 % of the true one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Histogram {
    /// Grows to the longest duration seen.
    counts: Vec<u64>,
    total: u64,
    longest: u64,
}

impl Histogram {
    /// Counts one duration.
    pub(crate) fn record(&mut self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let bucket = bucket(nanos);
        if bucket >= self.counts.len() {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] += 1;
        self.total += 1;
        self.longest = self.longest.max(nanos);
    }

    /// Adds all that `other` counted.
    pub(crate) fn merge(&mut self, other: &Self) {
        if other.counts.len() > self.counts.len() {
            self.counts.resize(other.counts.len(), 0);
        }
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.total += other.total;
        self.longest = self.longest.max(other.longest);
    }

    /// How many durations were counted.
    pub(crate) fn count(&self) -> u64 {
        self.total
    }

    /// The duration that a share `q` (0 to 1) of all do not exceed; zero when nothing was counted.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a rank is a whole number between zero and a count far below 2^52"
    )]
    pub(crate) fn quantile(&self, q: f64) -> Duration {
        let rank = ((self.total as f64 * q).ceil() as u64).max(1);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Duration::from_nanos(middle(bucket).min(self.longest));
            }
        }
        Duration::ZERO
    }
}

fn bucket(value: u64) -> usize {
    let shift = value.max(1).ilog2().saturating_sub(SUB_BITS);
    let within = value >> shift; // below 2 << SUB_BITS
    usize::try_from((u64::from(shift) << SUB_BITS) + within).expect("below 64 << SUB_BITS")
}

fn middle(bucket: usize) -> u64 {
    let shift = (bucket >> SUB_BITS).saturating_sub(1);
    let lower = ((bucket - (shift << SUB_BITS)) as u64) << shift;
    lower + ((1u64 << shift) >> 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_each_other_without_gap() {
        let mut last = 0;
        for value in 0..100_000 {
            let bucket = bucket(value);
            assert!(
                bucket == last || bucket == last + 1,
                "{value} skipped a bucket"
            );
            last = bucket;
        }
    }

    #[test]
    fn the_middle_of_a_bucket_is_within_a_hundredth_of_its_values() {
        for power in 0..63 {
            for value in [1u64 << power, (1 << power) + (1 << power) / 3] {
                let off = middle(bucket(value)).abs_diff(value);
                assert!(off <= value / 100, "{value} is off by {off}");
            }
        }
        assert_eq!(
            bucket(middle(bucket(u64::MAX))),
            bucket(u64::MAX),
            "the last bucket"
        );
    }

    #[test]
    fn quantiles_of_a_ramp_are_its_ranks() {
        let mut histogram = Histogram::default();
        for micros in 1..=1000 {
            histogram.record(Duration::from_micros(micros));
        }
        for (q, micros) in [(0.0, 1), (0.5, 500), (0.99, 990), (1.0, 1000)] {
            let expected = Duration::from_micros(micros);
            let off = histogram.quantile(q).abs_diff(expected);
            assert!(off <= expected / 100, "quantile {q} is off by {off:?}");
        }
    }

    #[test]
    fn merged_histograms_count_as_one() {
        let (mut short, mut long, mut all) = <(Histogram, Histogram, Histogram)>::default();
        for nanos in 0..500 {
            short.record(Duration::from_nanos(nanos));
            all.record(Duration::from_nanos(nanos));
            long.record(Duration::from_nanos(nanos * 1000));
            all.record(Duration::from_nanos(nanos * 1000));
        }
        short.merge(&long);
        assert_eq!(short.count(), 1000);
        for q in [0.1, 0.5, 0.9, 1.0] {
            assert_eq!(short.quantile(q), all.quantile(q), "quantile {q}");
        }
    }

    #[test]
    fn an_empty_histogram_answers_zero() {
        assert_eq!(Histogram::default().quantile(0.99), Duration::ZERO);
    }
}
