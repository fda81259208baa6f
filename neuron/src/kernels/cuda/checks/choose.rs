//! Tokens that a device chooses are those that the host chooses.

use super::Device;
use crate::gpu::Arg;
use crate::kernels::choose::{Edit, Pick, Rule};
use crate::kernels::testing::numbers;

/// Rows of logits of every kind that matters, followed by what does not count.
fn rows(width: usize) -> Vec<Vec<f32>> {
    let spread: Vec<f32> = numbers(4, width).iter().map(|x| 9.0 * x).collect();
    let coarse = spread.iter().map(|x| x.round()).collect(); // many are as likely as each other
    let mut sparse = vec![f32::NEG_INFINITY; width];
    sparse[width / 2] = -30.0;
    sparse[width - 1] = -31.0;
    let mut broken = [spread.clone(), spread.clone()];
    broken[0][width / 3] = f32::NAN;
    broken[1][width - 1] = f32::INFINITY;
    let [nan, infinite] = broken;
    let close: Vec<f32> = spread.iter().map(|x| 3.0 + x * 1e-7).collect();
    let hidden = vec![f32::NEG_INFINITY; width];
    let equal = vec![-7.0; width];
    vec![spread, coarse, sparse, nan, infinite, close, hidden, equal]
}

fn picks() -> Vec<Pick> {
    let mut picks = vec![Pick::LIKELIEST];
    for temperature in [0.01, 0.8, 50.0] {
        for (top_k, top_p, min_p) in [
            (0, 1.0, 0.0),
            (1, 1.0, 0.0),
            (7, 1.0, 0.0),
            (100_000, 1.0, 0.0),
            (0, 0.1, 0.0),
            (0, 0.9, 0.02),
            (0, 1e-300, 0.0),
            (20, 0.8, 0.0),
            (0, 1.0, 0.3),
            (0, 1.0, 1.0),
        ] {
            let random = numbers(picks.len() as u64, 2);
            let random = u64::from(random[0].to_bits()) << 41 ^ u64::from(random[1].to_bits());
            picks.push(Pick::by_chance(temperature, top_k, top_p, min_p, random));
        }
    }
    // lower than what can be divided by, and all filters at once
    picks.push(Pick::by_chance(1e-300, 0, 1.0, 0.0, 7));
    picks.push(Pick::by_chance(1e-300, 7, 0.9, 0.02, 7));
    picks.push(Pick::by_chance(1.5, 20, 0.8, 0.3, 7));
    let mut ends = picks.clone();
    ends.iter_mut().for_each(|pick| pick.random = u64::MAX);
    picks.extend(ends);
    picks
}

/// Every pick among every row, some with changes and masks.
pub(super) fn tokens_are_those_of_the_host(device: &Device) {
    for width in [1, 33, 1500, 70_000] {
        let picks = picks();
        // long rows are only few: each is looked at by a thousand threads of the emulator
        let picks = &picks[..if width > 10_000 { 9 } else { picks.len() }];
        let mut tasks = Vec::new();
        for (index, row) in rows(width).into_iter().enumerate() {
            for (at, pick) in picks.iter().enumerate() {
                let edits = (0..(index + at) % 4 * 3).map(|edit| Edit {
                    id: (edit * 5 + at) as u32, // some are past the width
                    divide: 1.0 + edit as f32,
                    add: [0.5, -3.0, f32::NEG_INFINITY][edit % 3],
                });
                let mask = (at % 3 == 1).then(|| {
                    let word =
                        |word: usize| (word as u32).wrapping_mul(0x9e37_79b9) | 1 << (at % 32);
                    (0..width.div_ceil(32)).map(word).collect()
                });
                let rule = Rule {
                    edits: edits.collect(),
                    mask,
                    pick: *pick,
                };
                tasks.push((row.clone(), rule));
            }
        }
        check(device, width, &tasks);
    }
}

fn check(device: &Device, width: usize, tasks: &[(Vec<f32>, Rule)]) {
    const BEHIND: [f32; 3] = [99.0; 3];
    let (stride, words) = (width + BEHIND.len(), width.div_ceil(32));
    let (mut logits, mut picks, mut edits, mut masks) =
        (Vec::new(), Vec::new(), vec![[u32::MAX; 4]], Vec::new());
    for (at, (row, rule)) in tasks.iter().enumerate() {
        logits.extend_from_slice(row);
        logits.extend(BEHIND);
        let mut pick = rule.pick;
        if let Some(mask) = &rule.mask {
            pick.mask = (masks.len() / words) as i32;
            masks.extend_from_slice(mask);
        }
        picks.push(pick);
        for edit in &rule.edits {
            edits.push([
                at as u32,
                edit.id,
                edit.divide.to_bits(),
                edit.add.to_bits(),
            ]);
        }
    }
    let logits = device.put(&logits);
    let args = [
        Arg::Address(logits),
        Arg::Int(stride as i32),
        Arg::Address(device.put(edits.as_flattened())),
        Arg::Int(edits.len() as i32),
        Arg::Int(tasks.len() as i32),
        Arg::Int(width as i32),
    ];
    device.run("edit_logits", [edits.len().div_ceil(64), 1, 1], 64, &args);
    let ids = device.room(tasks.len());
    let args = [
        Arg::Address(logits),
        Arg::Int(stride as i32),
        Arg::Int(width as i32),
        Arg::Address(device.put(&picks)),
        Arg::Address(device.put(&masks)),
        Arg::Int(words as i32),
        Arg::Address(ids),
    ];
    device.run("choose", [tasks.len(), 1, 1], 1024, &args);
    let ids: Vec<u32> = device.get(ids, tasks.len());
    for ((row, rule), id) in tasks.iter().zip(ids) {
        let expected = rule.choose(&mut row.clone()).unwrap_or(u32::MAX);
        assert_eq!(id, expected, "of {width}: {:?} {:?}", rule.pick, rule.edits);
    }
}
