//! What Prometheus is told of devices other than the CPU, as they are when it asks.

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntGaugeVec, Opts, Registry};

/// Gauges that are set anew whenever they are read. Where there is no device there is no gauge.
struct Gauges {
    total: IntGaugeVec,
    used: IntGaugeVec,
    utilization: IntGaugeVec,
    temperature: IntGaugeVec,
    processes: IntGaugeVec,
}

/// Registers the gauges.
///
/// # Panics
/// When they are registered twice in one registry.
pub fn register(registry: &Registry) {
    let gauge = |name: &str, help: &str| {
        IntGaugeVec::new(Opts::new(name, help), &["device"])
            .expect("names and labels are valid constants")
    };
    let gauges = Gauges {
        total: gauge("neuron_device_memory_bytes", "Memory of a device."),
        used: gauge(
            "neuron_device_memory_used_bytes",
            "Memory of a device that any process has taken.",
        ),
        utilization: gauge(
            "neuron_device_utilization_percent",
            "Share of the last moments in which a device ran a kernel.",
        ),
        temperature: gauge(
            "neuron_device_temperature_celsius",
            "Temperature of a device.",
        ),
        processes: gauge(
            "neuron_device_processes",
            "Processes that compute on a device.",
        ),
    };
    registry
        .register(Box::new(gauges))
        .expect("each family is registered once");
}

impl Gauges {
    fn all(&self) -> [&IntGaugeVec; 5] {
        [
            &self.total,
            &self.used,
            &self.utilization,
            &self.temperature,
            &self.processes,
        ]
    }

    fn refresh(&self) {
        let set = |gauge: &IntGaugeVec, id: &str, value: Option<u64>| {
            if let Some(value) = value {
                let value = i64::try_from(value).unwrap_or(i64::MAX);
                gauge.with_label_values(&[id]).set(value);
            }
        };
        for device in super::inventory() {
            if device.id != "cpu" {
                set(&self.total, &device.id, Some(device.total_bytes));
                let used = device.total_bytes.saturating_sub(device.free_bytes);
                set(&self.used, &device.id, Some(used));
            }
        }
        for now in super::cuda().map(|cuda| cuda.devices).unwrap_or_default() {
            let percent = now.utilization_percent.map(u64::from);
            set(&self.utilization, &now.id, percent);
            let celsius = now.temperature_celsius.map(u64::from);
            set(&self.temperature, &now.id, celsius);
            set(&self.processes, &now.id, now.processes.map(u64::from));
        }
    }
}

impl Collector for Gauges {
    fn desc(&self) -> Vec<&Desc> {
        self.all().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.all().into_iter().for_each(IntGaugeVec::reset);
        self.refresh();
        self.all()
            .into_iter()
            .flat_map(Collector::collect)
            .collect()
    }
}
