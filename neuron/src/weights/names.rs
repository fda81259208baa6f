//! The forms that checkpoints of one architecture come in, brought to one: the names and shapes of a Qwen3.5 release
//! with a tensor for each expert. Nothing is copied: a tensor that a file stacks or groups is seen as parts of it.

use super::checkpoint::Entry;
use std::collections::HashMap;
use std::ops::Range;

/// Heads of the linear attention, by which Qwen3-Next groups its projections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupedHeads {
    /// Key heads, each the head of a group.
    pub key: usize,
    /// Value heads; a group has `value / key`.
    pub value: usize,
    /// Width of a query and of a key.
    pub key_dim: usize,
    /// Width of a value and of its gate.
    pub value_dim: usize,
}

/// Every tensor under the name a model asks for.
///
/// * `experts.gate_up_proj` and `experts.down_proj`, all experts in one tensor → one tensor an expert and projection
/// * `in_proj_qkvz` and `in_proj_ba`, rows grouped by key head → `in_proj_qkv`, `in_proj_z`, `in_proj_b`, `in_proj_a`
///
/// A tensor whose shape does not allow it keeps its name, and is then reported as missing under the other.
pub(super) fn canonical(
    stored: HashMap<String, Entry>,
    heads: GroupedHeads,
) -> HashMap<String, Entry> {
    stored
        .into_iter()
        .flat_map(|(name, entry)| {
            split(&name, &entry, heads).unwrap_or_else(|| vec![(name, entry)])
        })
        .collect()
}

/// The parts of a tensor that has several in it.
fn split(name: &str, entry: &Entry, heads: GroupedHeads) -> Option<Vec<(String, Entry)>> {
    let (path, last) = name.rsplit_once('.')?;
    if entry.bytes.iter().all(Range::is_empty) {
        return None; // nothing vouches for its shape
    }
    match (last, &entry.shape[..]) {
        ("gate_up_proj", &[experts, both, _]) if path.ends_with(".experts") => {
            // (experts, gate rows and then up rows, hidden)
            let half = both / 2;
            let parts = (0..experts).flat_map(|expert| {
                let both_rows = entry.part(expert);
                [("gate_proj", 0..half), ("up_proj", half..both)].map(|(part, rows)| {
                    let name = format!("{path}.{expert}.{part}.weight");
                    (name, both_rows.rows(&[rows]))
                })
            });
            Some(parts.collect())
        }
        ("down_proj", &[experts, _, _]) if path.ends_with(".experts") => {
            let parts = (0..experts).map(|expert| {
                let name = format!("{path}.{expert}.down_proj.weight");
                (name, entry.part(expert))
            });
            Some(parts.collect())
        }
        ("weight", &[rows, _]) => {
            let (layer, projection) = path.rsplit_once('.')?;
            let group = heads.value / heads.key;
            let (key, values) = (heads.key_dim, group * heads.value_dim);
            // blocks of a group, and which of them make up which tensor
            type Tensors = &'static [(&'static str, Range<usize>)];
            let (blocks, tensors): (&[usize], Tensors) = match projection {
                "in_proj_qkvz" => (
                    &[key, key, values, values],
                    &[("in_proj_qkv", 0..3), ("in_proj_z", 3..4)],
                ),
                "in_proj_ba" => (&[group, group], &[("in_proj_b", 0..1), ("in_proj_a", 1..2)]),
                _ => return None,
            };
            if rows != heads.key * blocks.iter().sum::<usize>() {
                return None;
            }
            let parts = tensors.iter().map(|(tensor, own)| {
                let ranges = ungrouped(heads.key, blocks, own.clone());
                (format!("{layer}.{tensor}.weight"), entry.rows(&ranges))
            });
            Some(parts.collect())
        }
        _ => None,
    }
}

/// Where the rows of the blocks `own` lie: block by block, and in a block group by group.
fn ungrouped(groups: usize, blocks: &[usize], own: Range<usize>) -> Vec<Range<usize>> {
    let size: usize = blocks.iter().sum();
    own.flat_map(|block| {
        let before: usize = blocks[..block].iter().sum();
        (0..groups).map(move |group| {
            let start = group * size + before;
            start..start + blocks[block]
        })
    })
    .collect()
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // lists of ranges are what is compared
mod tests {
    use super::super::checkpoint::{Change, Stored};
    use super::*;
    use crate::quant::Format;

    const HEADS: GroupedHeads = GroupedHeads {
        key: 2,
        value: 4,
        key_dim: 3,
        value_dim: 5,
    };

    fn entry(shape: &[usize]) -> Entry {
        let count: usize = shape.iter().product();
        Entry {
            file: 0,
            stored: Stored::Format(Format::Bf16),
            shape: shape.to_vec(),
            bytes: std::iter::once(100..100 + 2 * count).collect(),
            columns: Vec::new(),
            change: Change::None,
        }
    }

    fn names(name: &str, shape: &[usize]) -> Vec<(String, Entry)> {
        let stored = HashMap::from([(name.to_owned(), entry(shape))]);
        let mut named: Vec<_> = canonical(stored, HEADS).into_iter().collect();
        named.sort_by(|a, b| a.0.cmp(&b.0));
        named
    }

    #[test]
    fn stacked_experts_become_a_tensor_each() {
        let named = names("layers.0.mlp.experts.gate_up_proj", &[2, 4, 3]);
        let found: Vec<_> = named
            .iter()
            .map(|(name, entry)| (&name[21..], &entry.shape[..], &entry.bytes[..]))
            .collect();
        assert_eq!(
            found,
            [
                ("0.gate_proj.weight", &[2, 3][..], &[100..112][..]),
                ("0.up_proj.weight", &[2, 3], &[112..124]),
                ("1.gate_proj.weight", &[2, 3], &[124..136]),
                ("1.up_proj.weight", &[2, 3], &[136..148]),
            ]
        );
        let named = names("layers.0.mlp.experts.down_proj", &[2, 3, 4]);
        assert_eq!(named[1].1.bytes, [124..148]);
        assert_eq!(named[1].1.shape, [3, 4]);
    }

    #[test]
    fn rows_grouped_by_key_head_are_put_in_order() {
        // a group: 3 of q, 3 of k, 10 of v, 10 of z; a row is two bytes wide
        let named = names("layers.0.linear_attn.in_proj_qkvz.weight", &[52, 1]);
        let row = |range: Range<usize>| 100 + 2 * range.start..100 + 2 * range.end;
        let (name, qkv) = &named[0];
        assert_eq!(name, "layers.0.linear_attn.in_proj_qkv.weight");
        assert_eq!(
            qkv.bytes,
            [0..3, 26..29, 3..6, 29..32, 6..16, 32..42].map(row)
        );
        assert_eq!(named[1].1.bytes, [16..26, 42..52].map(row), "z");
        let named = names("layers.0.linear_attn.in_proj_ba.weight", &[8, 1]);
        assert_eq!(named[1].0, "layers.0.linear_attn.in_proj_b.weight");
        assert_eq!(named[1].1.bytes, [0..2, 4..6].map(row));
        assert_eq!(named[0].1.bytes, [2..4, 6..8].map(row), "a");
    }

    #[test]
    fn what_does_not_fit_keeps_its_name() {
        for (name, shape) in [
            ("layers.0.linear_attn.in_proj_qkvz.weight", &[51, 1][..]),
            ("layers.0.mlp.experts.gate_up_proj", &[4, 3]),
            ("layers.0.mlp.down_proj.weight", &[4, 3]),
        ] {
            assert_eq!(names(name, shape)[0].0, name);
        }
    }
}
