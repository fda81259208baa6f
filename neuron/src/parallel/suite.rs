//! What every communicator has to do, whatever carries it. A new one adds a line to [`groups`].

use super::{Communicator, GroupError, Solo, Threads};
use candle_core::{DType, Device, Tensor};
use std::sync::Arc;
use std::time::Duration;

type Group = Vec<Arc<dyn Communicator>>;

/// Long: a rank that comes is never too late.
const PATIENT: Duration = Duration::from_secs(3600);

fn threads(world_size: usize, deadline: Duration) -> Group {
    let ranks = Threads::group(world_size, deadline).unwrap().into_iter();
    ranks
        .map(|rank| Arc::new(rank) as Arc<dyn Communicator>)
        .collect()
}

/// A whole group of every kind and size.
fn groups() -> Vec<Group> {
    let mut groups: Vec<Group> = vec![vec![Arc::new(Solo)]];
    groups.extend([1, 2, 3, 4, 7].map(|world_size| threads(world_size, PATIENT)));
    groups
}

/// Does `work` on every rank of `group` at once; what each gives, in their order.
fn on_all<T: Send>(group: &Group, work: impl Fn(&dyn Communicator) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let ranks: Vec<_> = group
            .iter()
            .map(|rank| {
                let work = &work;
                scope.spawn(move || work(&**rank))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// `(rows, width)` numbers that are different on each rank, and exact in bf16 as their sums are.
fn part(rank: usize, (rows, width): (usize, usize), kind: DType) -> Tensor {
    let numbers = (0..rows * width).map(|at| ((at * 7 + rank * 3) % 16) as f32);
    let numbers = numbers.collect::<Vec<_>>();
    Tensor::from_vec(numbers, (rows, width), &Device::Cpu)
        .unwrap()
        .to_dtype(kind)
        .unwrap()
}

fn rows(tensor: &Tensor) -> Vec<Vec<f32>> {
    tensor.to_dtype(DType::F32).unwrap().to_vec2().unwrap()
}

const KINDS: [DType; 2] = [DType::F32, DType::BF16];
const SHAPES: [(usize, usize); 5] = [(1, 1), (1, 7), (3, 5), (2, 1023), (65, 33)];

#[test]
fn sums_are_those_of_all_parts_on_every_rank() {
    for group in groups() {
        for kind in KINDS {
            for shape in SHAPES {
                let sums = on_all(&group, |rank| {
                    rank.all_reduce(&part(rank.rank(), shape, kind)).unwrap()
                });
                let expected = (0..group.len()).map(|rank| part(rank, shape, DType::F32));
                let expected = expected.reduce(|sum, part| (sum + part).unwrap()).unwrap();
                for sum in sums {
                    assert_eq!(sum.dtype(), kind);
                    assert_eq!(rows(&sum), rows(&expected), "{} ranks", group.len());
                }
            }
        }
    }
}

#[test]
fn sums_have_the_same_bits_on_every_rank_and_in_every_run() {
    let uneven = |rank: usize| {
        let numbers =
            (0..1001).map(|at| ((at * 31 + rank * 17) as f32).sin() * 10f32.powi(rank as i32));
        Tensor::from_iter(numbers, &Device::Cpu).unwrap()
    };
    let mut all = Vec::new();
    for _ in 0..5 {
        let group = threads(4, PATIENT);
        all.extend(on_all(&group, |rank| {
            let sum = rank.all_reduce(&uneven(rank.rank())).unwrap();
            let bits = sum.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits);
            bits.collect::<Vec<_>>()
        }));
    }
    assert!(all.iter().all(|bits| *bits == all[0]));
}

#[test]
fn parts_of_any_width_are_gathered_in_the_order_of_ranks() {
    for group in groups() {
        for kind in KINDS {
            for (height, width) in SHAPES {
                let own = |rank: usize| part(rank, (height, width + rank), kind);
                let gathered = on_all(&group, |rank| {
                    let own = own(rank.rank());
                    let all = rank.all_gather(&own, 1).unwrap();
                    (all, rank.gather(&own, 1).unwrap())
                });
                let parts: Vec<Tensor> = (0..group.len()).map(own).collect();
                let expected = rows(&Tensor::cat(&parts, 1).unwrap());
                for (rank, (all, first)) in gathered.iter().enumerate() {
                    assert_eq!((rows(all), all.dtype()), (expected.clone(), kind));
                    let first = first.as_ref().map(rows);
                    assert_eq!(first, (rank == 0).then(|| expected.clone()));
                }
            }
        }
    }
}

#[test]
fn everybody_gets_what_the_root_brought() {
    for group in groups() {
        for kind in KINDS {
            for root in 0..group.len() {
                let shape = (3, 5);
                let got = on_all(&group, |rank| {
                    rank.broadcast(&part(rank.rank(), shape, kind), root)
                        .unwrap()
                });
                let expected = rows(&part(root, shape, kind));
                assert!(got.iter().all(|tensor| rows(tensor) == expected));
            }
        }
    }
}

#[test]
fn many_calls_of_every_kind_are_never_mixed_up() {
    let group = threads(3, PATIENT);
    let sums = on_all(&group, |rank| {
        let mut seen = 0.0;
        for call in 0..2000_usize {
            let own = Tensor::full((call + rank.rank()) as f32, (1, 1), &Device::Cpu).unwrap();
            let got = match call % 4 {
                0 | 1 => rank.all_reduce(&own).unwrap(), // 3 · call + 3
                2 => rank.broadcast(&own, call % 3).unwrap(),
                _ => rank.all_gather(&own, 1).unwrap(),
            };
            let expected = match call % 4 {
                0 | 1 => vec![(3 * call + 3) as f32],
                2 => vec![(call + call % 3) as f32],
                _ => (call..call + 3).map(|n| n as f32).collect(),
            };
            assert_eq!(rows(&got), [expected], "call {call}");
            seen += 1.0;
        }
        seen
    });
    assert_eq!(sums, [2000.0; 3]);
}

/// Every call of a broken group, now and later, gives `fault`.
fn assert_broken(rank: &dyn Communicator, fault: &GroupError) {
    let own = part(0, (1, 1), DType::F32);
    assert_eq!(rank.all_reduce(&own).unwrap_err(), *fault);
    assert_eq!(rank.all_gather(&own, 0).unwrap_err(), *fault);
    assert_eq!(rank.gather(&own, 0).unwrap_err(), *fault);
    assert_eq!(rank.broadcast(&own, 0).unwrap_err(), *fault);
    assert_eq!(rank.fault().as_ref(), Some(fault));
}

#[test]
fn a_rank_that_dies_is_told_to_all_who_wait_and_who_come_later() {
    for panics in [false, true] {
        let mut group = threads(3, PATIENT);
        let dying = group.pop().unwrap();
        let ended = GroupError::Ended { rank: 2 };
        std::thread::scope(|scope| {
            for rank in &group {
                let ended = &ended;
                scope.spawn(move || {
                    rank.all_reduce(&part(rank.rank(), (1, 5), DType::F32))
                        .unwrap();
                    assert_broken(&**rank, ended);
                });
            }
            let last = scope.spawn(move || {
                dying.all_reduce(&part(2, (1, 5), DType::F32)).unwrap();
                if panics {
                    std::panic::resume_unwind(Box::new("planted")); // without the words of a panic
                }
            });
            assert_eq!(last.join().is_err(), panics);
        });
    }
}

#[test]
fn a_rank_that_does_not_come_is_given_up_by_all_and_finds_the_group_broken() {
    let deadline = Duration::from_millis(1);
    let group = threads(2, deadline);
    let stalled = GroupError::Stalled { rank: 1, deadline };
    assert_broken(&*group[0], &stalled);
    assert_broken(&*group[1], &stalled); // it comes when the other one has given it up
    // with more of them, whoever is late is missed by the first whose patience ends: all are told the same
    let group = threads(4, deadline);
    let found = on_all(&group, |rank| match rank.rank() {
        3 => None,
        _ => Some(rank.all_reduce(&part(0, (1, 5), DType::F32)).unwrap_err()),
    });
    let first = found[0].clone().unwrap();
    assert!(matches!(first, GroupError::Stalled { .. }), "{first}");
    assert!(found[..3].iter().all(|one| one.as_ref() == Some(&first)));
    assert_broken(&*group[3], &first);
}

#[test]
fn a_rank_that_gives_up_says_why_and_the_first_reason_stays() {
    let group = threads(2, PATIENT);
    let failed = |rank, reason: &str| GroupError::Failed {
        rank,
        reason: reason.into(),
    };
    std::thread::scope(|scope| {
        scope.spawn(|| assert_broken(&*group[0], &failed(1, "no memory")));
        group[1].abort(failed(1, "no memory"));
    });
    group[0].abort(failed(0, "later"));
    assert_broken(&*group[1], &failed(1, "no memory"));
}

#[test]
fn ranks_that_are_not_at_the_same_place_are_told_so() {
    let own = part(0, (1, 3), DType::F32);
    let other_call = |rank: &dyn Communicator| match rank.rank() {
        0 => rank.all_reduce(&own).unwrap_err(),
        _ => rank.broadcast(&own, 0).unwrap_err(),
    };
    let other_shape =
        |rank: &dyn Communicator| match rank.all_reduce(&part(0, (1, 3 + rank.rank()), DType::F32))
        {
            Err(error) => error,
            Ok(sum) => panic!("a sum of different shapes: {sum}"),
        };
    let other_kind = |rank: &dyn Communicator| {
        let own = part(0, (1, 3), KINDS[rank.rank()]);
        rank.all_reduce(&own).unwrap_err()
    };
    for found in [
        on_all(&threads(2, PATIENT), other_call),
        on_all(&threads(2, PATIENT), other_shape),
        on_all(&threads(2, PATIENT), other_kind),
    ] {
        assert!(matches!(found[0], GroupError::Apart { .. }), "{}", found[0]);
        assert_eq!(found[0], found[1]);
    }
}

#[test]
fn what_all_have_come_to_is_had_even_if_one_has_left_since() {
    let mut group = threads(2, PATIENT);
    let leaves = group.pop().unwrap();
    let own = part(0, (1, 3), DType::F32);
    std::thread::scope(|scope| {
        let stays = scope.spawn(|| group[0].all_reduce(&own));
        drop((leaves.all_reduce(&own).unwrap(), leaves));
        stays.join().unwrap().unwrap();
    });
    assert_broken(&*group[0], &GroupError::Ended { rank: 1 });
}
