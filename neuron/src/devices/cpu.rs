//! The host's own memory, within the bounds a container sets.

use protocol::node::DeviceInfo;
use std::path::Path;

/// Bytes of main memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Memory {
    pub(super) total: u64,
    pub(super) free: u64,
}

pub(super) fn describe() -> DeviceInfo {
    let memory = memory().unwrap_or(Memory { total: 0, free: 0 });
    DeviceInfo {
        id: "cpu".into(),
        name: name().unwrap_or_else(|| std::env::consts::ARCH.into()),
        total_bytes: memory.total,
        free_bytes: memory.free,
        many_ranks: true,
    }
}

/// What the system says of its memory, or the container's part of it where that is less.
pub(super) fn memory() -> Option<Memory> {
    let host = parse_meminfo(&read("/proc/meminfo")?)?;
    let limit = parse_limit(&read("/sys/fs/cgroup/memory.max").unwrap_or_default());
    let used = parse_limit(&read("/sys/fs/cgroup/memory.current").unwrap_or_default());
    let cache = read("/sys/fs/cgroup/memory.stat").and_then(|stat| parse_cache(&stat));
    Some(match (limit, used) {
        (Some(limit), Some(used)) => {
            // Page cache is given back when it is needed.
            let used = used.saturating_sub(cache.unwrap_or(0));
            Memory {
                total: host.total.min(limit),
                free: host.free.min(limit.saturating_sub(used)),
            }
        }
        _ => host,
    })
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(Path::new(path)).ok()
}

fn parse_meminfo(text: &str) -> Option<Memory> {
    let kibibytes = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let number: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(number * 1024)
    };
    Some(Memory {
        total: kibibytes("MemTotal:")?,
        free: kibibytes("MemAvailable:")?,
    })
}

/// A number, or none for `max`.
fn parse_limit(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

fn parse_cache(stat: &str) -> Option<u64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("file "))?;
    line.trim().parse().ok()
}

fn name() -> Option<String> {
    let info = read("/proc/cpuinfo")?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:       16000 kB\nMemFree:  1 kB\nMemAvailable:    8000 kB\n";
        let memory = Memory {
            total: 16_384_000,
            free: 8_192_000,
        };
        assert_eq!(parse_meminfo(text), Some(memory));
        assert_eq!(parse_meminfo("nothing"), None);
    }

    #[test]
    fn a_container_without_a_bound_has_none() {
        assert_eq!(parse_limit("max\n"), None);
        assert_eq!(parse_limit("1024\n"), Some(1024));
        assert_eq!(parse_cache("anon 5\nfile 7\n"), Some(7));
    }
}
