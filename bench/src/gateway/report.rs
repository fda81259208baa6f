//! From samples to a table.

use super::{Reply, Sample};
use crate::machine::Machine;
use crate::servers::Via;
use serde::Serialize;
use std::fmt;

/// Everything that was measured. Its text is the Markdown of the table.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    /// The proxies, as they name themselves.
    pub(crate) versions: Vec<String>,
    /// Between two events of a stream; 0 is as fast as they can be written.
    pub(crate) pace_ms: u64,
    /// Threads of the load generator, and as many again of the mock.
    pub(crate) generator_threads: usize,
    pub(crate) samples: Vec<Sample>,
}

/// The samples of one load by one way.
struct Row<'a> {
    reply: Reply,
    concurrency: u64,
    via: Via,
    samples: Vec<&'a Sample>,
}

impl Report {
    /// Rows in the order of the first round.
    fn rows(&self) -> Vec<Row<'_>> {
        let mut rows: Vec<Row<'_>> = Vec::new();
        for sample in &self.samples {
            let key = (sample.reply, sample.concurrency, sample.via);
            match rows
                .iter_mut()
                .find(|row| (row.reply, row.concurrency, row.via) == key)
            {
                Some(row) => row.samples.push(sample),
                None => rows.push(Row {
                    reply: sample.reply,
                    concurrency: sample.concurrency,
                    via: sample.via,
                    samples: vec![sample],
                }),
            }
        }
        rows
    }
}

impl Row<'_> {
    fn median(&self, figure: impl Fn(&Sample) -> f64) -> f64 {
        let mut values: Vec<_> = self.samples.iter().map(|sample| figure(sample)).collect();
        median(&mut values)
    }

    /// Median and minimum of the proxy's CPU time in microseconds a request.
    fn cpu(&self) -> Option<(f64, f64)> {
        let mut values: Vec<_> = self.samples.iter().filter_map(|s| s.proxy_cpu_us).collect();
        let least = values.iter().copied().reduce(f64::min)?;
        Some((median(&mut values), least))
    }

    /// Prints the row; `nginx` is the one of the same load.
    fn write(&self, f: &mut fmt::Formatter<'_>, nginx: Option<&Row<'_>>) -> fmt::Result {
        let reply = match self.reply {
            Reply::Whole => "1 KB JSON",
            Reply::Stream => "SSE, 100 events",
        };
        let cpu = match self.cpu() {
            Some((median, least)) => format!("{median:.1} / {least:.1}"),
            None => "–".into(),
        };
        let cpu_ratio = match (self.cpu(), nginx.and_then(Row::cpu)) {
            (Some(own), Some(other)) if self.via != Via::Nginx => {
                format!("{} / {}", ratio(own.0, other.0), ratio(own.1, other.1))
            }
            _ => "–".into(),
        };
        let rate = self.median(|s| s.figures.requests_per_second);
        let rate_ratio = match nginx {
            Some(nginx) if self.via != Via::Nginx => {
                ratio(rate, nginx.median(|s| s.figures.requests_per_second))
            }
            _ => "–".into(),
        };
        writeln!(
            f,
            "| {reply} | {} | {} | {cpu} | {cpu_ratio} | {:.1} | {rate:.0} | {rate_ratio} | {:.2} | {:.2} | {:.2} | {} |",
            self.concurrency,
            self.via.as_str(),
            self.median(|s| s.mock_cpu_us),
            self.median(|s| s.figures.first_byte_p50_ms),
            self.median(|s| s.figures.p50_ms),
            self.median(|s| s.figures.p99_ms),
            self.samples.iter().map(|s| s.figures.errors).sum::<u64>(),
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let machine = &self.machine;
        let rows = self.rows();
        let rounds = rows.iter().map(|row| row.samples.len()).max().unwrap_or(0);
        writeln!(
            f,
            "{}, {} cores, Linux {}, load average {} before; {}. {}. Median of {rounds} rounds, CPU also the minimum; \
             load generator and mock on {} thread(s) each; {}.{}",
            machine.cpu,
            machine.cores,
            machine.kernel,
            machine.load_before,
            machine.date,
            self.versions.join("; "),
            self.generator_threads,
            match self.pace_ms {
                0 => "events unpaced".to_owned(),
                pace => format!("an event every {pace} ms"),
            },
            if cfg!(debug_assertions) {
                " **Debug build of the bench: rates and latencies mean nothing.**"
            } else {
                ""
            }
        )?;
        writeln!(f)?;
        writeln!(
            f,
            "| reply | connections | via | CPU µs/request | ÷ nginx | mock CPU µs | req/s | ÷ nginx | first byte p50 ms | p50 ms | p99 ms | errors |"
        )?;
        writeln!(f, "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")?;
        for row in &rows {
            let nginx = rows.iter().find(|other| {
                (other.reply, other.concurrency, other.via)
                    == (row.reply, row.concurrency, Via::Nginx)
            });
            row.write(f, nginx)?;
        }
        Ok(())
    }
}

fn ratio(own: f64, other: f64) -> String {
    if other > 0.0 {
        format!("{:.2}", own / other)
    } else {
        "–".into()
    }
}

/// The middle value, or the mean of the two middle ones; zero of none.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        count if count % 2 == 1 => values[count / 2],
        count => f64::midpoint(values[count / 2 - 1], values[count / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Figures;

    fn sample(round: u64, via: Via, cpu: Option<f64>, rate: f64) -> Sample {
        Sample {
            round,
            reply: Reply::Whole,
            concurrency: 64,
            via,
            figures: Figures {
                requests: 10,
                errors: 1,
                first_error: None,
                requests_per_second: rate,
                p50_ms: 2.0,
                p99_ms: 3.0,
                first_byte_p50_ms: 1.0,
                first_byte_p99_ms: 1.5,
            },
            proxy_cpu_us: cpu,
            mock_cpu_us: 4.0,
        }
    }

    #[test]
    fn a_median_is_the_middle_or_the_mean_of_the_middle_two() {
        assert!((median(&mut [3.0, 1.0, 2.0]) - 2.0).abs() < 1e-12);
        assert!((median(&mut [4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-12);
        assert!(median(&mut []).abs() < 1e-12);
    }

    #[test]
    fn a_row_holds_medians_minima_and_ratios_to_nginx() {
        let samples = vec![
            sample(0, Via::Direct, None, 400.0),
            sample(0, Via::Nginx, Some(20.0), 200.0),
            sample(0, Via::Cortex, Some(30.0), 100.0),
            sample(1, Via::Cortex, Some(50.0), 100.0),
            sample(1, Via::Direct, None, 400.0),
            sample(1, Via::Nginx, Some(20.0), 200.0),
        ];
        let report = Report {
            machine: Machine::here(),
            versions: vec!["nginx version: x".into()],
            pace_ms: 0,
            generator_threads: 1,
            samples,
        }
        .to_string();
        for row in [
            "| 1 KB JSON | 64 | direct | – | – | 4.0 | 400 | 2.00 | 1.00 | 2.00 | 3.00 | 2 |",
            "| 1 KB JSON | 64 | nginx | 20.0 / 20.0 | – | 4.0 | 200 | – | 1.00 | 2.00 | 3.00 | 2 |",
            "| 1 KB JSON | 64 | cortex | 40.0 / 30.0 | 2.00 / 1.50 | 4.0 | 100 | 0.50 | 1.00 | 2.00 | 3.00 | 2 |",
        ] {
            assert!(report.contains(row), "{row} is not in\n{report}");
        }
    }
}
