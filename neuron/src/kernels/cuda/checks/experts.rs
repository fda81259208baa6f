//! Which experts rows go to, and what is made of their answers.

use super::{Device, wide, worst};
use crate::gpu::Arg;
use crate::kernels::testing::numbers;

/// Experts and their weights for a row, the likeliest first and of equals the first.
fn likeliest(logits: &[f32], chosen: usize, normed: bool) -> Vec<(i32, f64)> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut weights: Vec<(i32, f64)> = (0..)
        .zip(logits)
        .map(|(expert, logit)| (expert, f64::from(logit - top).exp()))
        .collect();
    let sum = |weights: &[(i32, f64)]| weights.iter().map(|(_, weight)| weight).sum::<f64>();
    let all = sum(&weights);
    weights.sort_by(|a, b| b.1.total_cmp(&a.1));
    weights.truncate(chosen);
    let divisor = if normed { sum(&weights) } else { all };
    weights.iter_mut().for_each(|(_, x)| *x /= divisor);
    weights
}

/// What the kernel found.
struct Routed {
    weights: Vec<f32>,
    visits: Vec<i32>,
    groups: Vec<[i32; 4]>,
}

/// Room for groups beyond what there can be: it is to say that there are none.
const SPARE: usize = 3;

fn route(
    device: &Device,
    logits: &[f32],
    (experts, chosen): (usize, usize),
    normed: bool,
    most: usize,
) -> Routed {
    let rows = logits.len() / experts;
    let all = rows * chosen;
    let group_count = all + SPARE;
    let [weights, visits] = [0, 1].map(|_| device.room(all));
    let groups = device.room(4 * group_count);
    let args = [
        Arg::Address(device.put(logits)),
        Arg::Int(rows as i32),
        Arg::Int(experts as i32),
        Arg::Int(chosen as i32),
        Arg::Int(i32::from(normed)),
        Arg::Int(most as i32),
        Arg::Address(weights),
        Arg::Address(visits),
        Arg::Address(groups),
        Arg::Int(group_count as i32),
    ];
    // as many warps as experts need, and more
    let block = (experts.next_multiple_of(32) + 64 * (rows % 2)).min(512);
    device.run("route", [1, 1, 1], block as u32, &args);
    Routed {
        weights: device.get(weights, all),
        visits: device.get(visits, all),
        groups: device.get(groups, group_count),
    }
}

pub(super) fn rows_go_to_their_likeliest_experts(device: &Device) {
    // few and many of each, what does not fill warps, and the most there is room for
    for (rows, experts, chosen) in [
        (1, 8, 3),
        (5, 70, 4),
        (17, 256, 8),
        (64, 5, 5),
        (64, 512, 16),
    ] {
        let mut logits: Vec<f32> = numbers(1, rows * experts);
        logits.iter_mut().for_each(|x| *x *= 5.0);
        let rows_of = logits.chunks_exact_mut(experts);
        for (row, logits) in rows_of.enumerate() {
            match row % 4 {
                1 => logits.fill(0.5), // all the same
                2 => {
                    // equals, and what is nothing beside others
                    for at in (0..experts).step_by(3) {
                        logits[at] = 4.0;
                    }
                    logits[experts / 2] = -1e30;
                }
                _ => {}
            }
        }
        for (normed, most) in [(true, 4), (false, 1), (false, 8)] {
            let found = route(device, &logits, (experts, chosen), normed, most);
            let expected: Vec<(i32, f64)> = logits
                .chunks_exact(experts)
                .flat_map(|logits| likeliest(logits, chosen, normed))
                .collect();
            let what = format!("{rows} rows, {chosen} of {experts}, by {most}");
            let weights: Vec<f64> = expected.iter().map(|(_, weight)| *weight).collect();
            assert!(worst(&found.weights, &weights) < 1e-6, "{what}");

            // visits of one expert by row, experts in order; parts of that, and then none
            let mut visits: Vec<i32> = (0..expected.len() as i32).collect();
            visits.sort_by_key(|visit| expected[*visit as usize].0);
            assert_eq!(found.visits, visits, "{what}");
            let mut groups: Vec<[i32; 4]> = Vec::new();
            for (place, visit) in (0..).zip(&visits) {
                let expert = expected[*visit as usize].0;
                match groups.last_mut() {
                    Some([last, _, count, _]) if *last == expert && *count < most as i32 => {
                        *count += 1;
                    }
                    _ => groups.push([expert, place, 1, 0]),
                }
            }
            groups.resize(found.groups.len(), [0; 4]);
            assert_eq!(found.groups, groups, "{what}");
        }
    }
}

pub(super) fn what_is_no_number_goes_to_experts_that_are_there(device: &Device) {
    let (experts, chosen) = (40, 6);
    let mut logits = numbers(2, 3 * experts);
    logits[..experts].fill(f32::NAN);
    logits[experts + 7] = f32::NAN;
    for normed in [false, true] {
        let found = route(device, &logits, (experts, chosen), normed, 4);
        assert!(
            found.weights[..2 * chosen].iter().any(|x| x.is_nan()),
            "it shows"
        );
        let mut visits = found.visits.clone();
        visits.sort_unstable();
        assert!(visits.into_iter().eq(0..3 * chosen as i32), "each once");
        for [expert, _, count, _] in &found.groups {
            assert!((0..experts as i32).contains(expert) && *count <= 3);
        }
        // the row beside them is as ever
        let row = &logits[2 * experts..];
        let expected = likeliest(row, chosen, normed);
        let weights: Vec<f64> = expected.iter().map(|(_, weight)| *weight).collect();
        assert!(worst(&found.weights[2 * chosen..], &weights) < 1e-6);
    }
}

pub(super) fn answers_of_experts_are_summed(device: &Device) {
    for (rows, width, chosen) in [(1, 30, 1), (3, 77, 4), (2, 300, 10)] {
        let shared = numbers(1, rows * width);
        let gates = numbers(2, rows);
        let answers = numbers(3, rows * chosen * width);
        let weights = numbers(4, rows * chosen);
        let sum = device.put(&shared);
        let mut args = vec![Arg::Address(sum)];
        for values in [&gates, &answers, &weights] {
            args.push(Arg::Address(device.put(values)));
        }
        args.extend([width, chosen].map(|size| Arg::Int(size as i32)));
        device.run("combine", [rows, width.div_ceil(64), 1], 64, &args);
        let expected: Vec<f64> = wide(&shared)
            .into_iter()
            .enumerate()
            .map(|(at, shared)| {
                let (row, column) = (at / width, at % width);
                let of_experts = (row * chosen..(row + 1) * chosen).map(|visit| {
                    f64::from(weights[visit]) * f64::from(answers[visit * width + column])
                });
                shared / (1.0 + (-f64::from(gates[row])).exp()) + of_experts.sum::<f64>()
            })
            .collect();
        let found = worst(&device.get(sum, rows * width), &expected);
        assert!(found < 1e-5, "{rows}, {width}, {chosen}: {found}");
    }
}
