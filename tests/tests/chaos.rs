//! Nodes that die, hang, lie and talk nonsense, and gateways that are killed: every request ends, and nothing is left.

#![allow(missing_docs, clippy::unwrap_used)]

use futures::future::join_all;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::json;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tests::daemon::Cortex;
use tests::endings::{ending, nothing_is_left};
use tests::fake_node::{FakeNode, Loading, Manner, Script, words};
use tests::until;

const BOUNDS: &str = "[timeouts]\nhead = \"300ms\"\nidle = \"300ms\"\nload = \"1s\"\nconnect = \"200ms\"\nkeep_alive = \"100ms\"\n\
                      [routing]\nbreak_open = \"50ms\"\nbreak_longest = \"200ms\"\n";

/// For nodes that stop talking about themselves.
const QUICK_POLLS: &str = "[fleet]\npoll = \"100ms\"\npoll_timeout = \"1s\"\n";
/// Nodes that are well stay so, however busy the machine is that plays them.
const PATIENT_POLLS: &str = "[fleet]\npoll = \"100ms\"\npoll_timeout = \"60s\"\n";

/// A behaviour by chance, good ones as often as bad ones.
fn behaviour(random: &mut StdRng) -> Script {
    let events = words(&["one", "two"]);
    let scripts = [
        Script::Answer,
        Script::Stream(events.clone()),
        Script::Stream(events.clone()),
        Script::Refuse(
            503,
            json!({"error": {"message": "busy", "type": "server_error"}}),
        ),
        Script::Refuse(500, json!("not even an object")),
        Script::Nonsense("<html>".into()),
        Script::Hang(events[..2].to_vec()),
        Script::Silent,
        Script::Limited(1, Duration::from_millis(5)),
        Script::Tear(events[..2].to_vec()),
    ];
    scripts.choose(random).unwrap().clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_nodes_do_every_request_ends_and_nothing_is_left() {
    let mut random = StdRng::seed_from_u64(7);
    let nodes = [
        FakeNode::start("a").await.holding("m", 100),
        FakeNode::start("b").await.holding("m", 100),
        FakeNode::start("c").await.sized("cold", 300),
    ];
    let at = [
        ("a", nodes[0].address),
        ("b", nodes[1].address),
        ("c", nodes[2].address),
    ];
    let models = "[[models]]\nid = \"cold\"\nsource = \"/models/cold\"\nmemory = \"300B\"\nkeep_alive = \"50ms\"\n\
                  [[models]]\nid = \"large\"\nsource = \"/models/large\"\nmemory = \"900B\"\n";
    let cortex = Cortex::start(&at, models, BOUNDS).await;
    let files = cortex.open_files();
    let over = AtomicBool::new(false);
    let asked = AtomicUsize::new(0);
    let ask = |seed: u64| {
        let (cortex, over, asked) = (&cortex, &over, &asked);
        async move {
            let mut random = StdRng::seed_from_u64(seed);
            let mut endings = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let model = *["m", "m", "m", "cold", "large", "none"]
                    .choose(&mut random)
                    .unwrap();
                endings.push(ending(cortex, model, random.random_bool(0.5)).await);
                asked.fetch_add(1, Ordering::Relaxed);
            }
            endings
        }
    };
    let disturb = async {
        for round in 0..40 {
            for node in &nodes {
                node.script(behaviour(&mut random));
                node.step();
                node.loading(match random.random_range(0..4) {
                    0 => Loading::Fails("no such folder".into()),
                    1 => Loading::Held,
                    _ => Loading::Prompt,
                });
                if random.random_bool(0.3) {
                    node.release();
                }
            }
            if round % 4 == 0 {
                cortex.daemon.signal("HUP");
            }
            let goal = asked.load(Ordering::Relaxed) + 5;
            until("some requests end", || async {
                nodes.iter().for_each(FakeNode::step); // torn streams are cut at a step
                (asked.load(Ordering::Relaxed) >= goal).then_some(())
            })
            .await;
        }
        for node in &nodes {
            node.script(Script::Answer);
            node.loading(Loading::Prompt);
            node.release();
        }
        over.store(true, Ordering::Relaxed);
    };
    let (endings, ()) = futures::future::join(join_all((0..16).map(ask)), disturb).await;
    let endings: Vec<String> = endings.concat();
    let count = |how: &str| endings.iter().filter(|ending| *ending == how).count();
    assert!(count("answer") > 50, "{endings:?}");
    assert_eq!(count("unreachable") + count("cut"), 0, "{endings:?}");
    until("all is well again", || async {
        (ending(&cortex, "m", false).await == "answer").then_some(())
    })
    .await;
    nothing_is_left(&cortex, files, 16).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_reloads_that_takes_a_node_and_gives_it_back_costs_no_request() {
    let a = FakeNode::start("a").await.holding("m", 100);
    let b = FakeNode::start("b").await.holding("m", 100);
    let cortex = Cortex::start(&[("a", a.address), ("b", b.address)], "", "").await;
    let files = cortex.open_files();
    let over = AtomicBool::new(false);
    let ask = |_| async {
        let mut endings = Vec::new();
        while !over.load(Ordering::Relaxed) {
            endings.push(ending(&cortex, "m", false).await);
        }
        endings
    };
    let both = [("a", a.address), ("b", b.address)];
    let storm = async {
        for round in 0..50 {
            cortex.rewrite(&both[..1 + round % 2], "", "");
            cortex.daemon.signal("HUP");
            ending(&cortex, "m", false).await;
        }
        over.store(true, Ordering::Relaxed);
    };
    let (endings, ()) = futures::future::join(join_all((0..8).map(ask)), storm).await;
    let endings = endings.concat();
    assert!(endings.len() > 50, "{}", endings.len());
    assert!(
        endings.iter().all(|ending| ending == "answer"),
        "{endings:?}"
    );
    nothing_is_left(&cortex, files, 9).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_is_killed_finds_its_fleet_again() {
    let node = FakeNode::start("a").await.holding("m", 100);
    node.script(Script::Silent);
    let mut cortex = Cortex::start(&[("a", node.address)], "", "").await;
    let lost = join_all((0..8).map(|_| ending(&cortex, "m", false)));
    tokio::select! {
        _ = lost => panic!("nobody answers"),
        () = node.asked(8) => {}
    }
    cortex.replace().await;
    node.script(Script::Answer);
    node.left(8).await; // the node is not left with what nobody waits for
    cortex.sees(&[("a", "up")]).await;
    assert_eq!(ending(&cortex, "m", false).await, "answer");
}

/// Eight clients ask until `disturb` is over; how their requests ended.
async fn meanwhile(cortex: &Cortex, disturb: impl Future<Output = ()>) -> Vec<String> {
    let over = AtomicBool::new(false);
    let ask = |_| async {
        let mut endings = Vec::new();
        while !over.load(Ordering::Relaxed) {
            endings.push(ending(cortex, "m", false).await);
        }
        endings
    };
    let disturb = async {
        disturb.await;
        over.store(true, Ordering::Relaxed);
    };
    let (endings, ()) = futures::future::join(join_all((0..8).map(ask)), disturb).await;
    endings.concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_is_killed_under_load_goes_on_where_it_was() {
    let a = FakeNode::start("a").await.holding("m", 100);
    let b = FakeNode::start("b").await.holding("m", 100);
    let nodes = [("a", a.address), ("b", b.address)];
    let mut cortex = Cortex::start(&nodes, "", "").await;
    for _ in 0..3 {
        let asked = a.seen().len() + b.seen().len();
        let killed = async {
            until("some requests come", || async {
                (a.seen().len() + b.seen().len() > asked + 20).then_some(())
            })
            .await;
            cortex.daemon.signal("KILL");
            until("nobody listens any more", || async {
                (ending(&cortex, "m", false).await == "unreachable").then_some(())
            })
            .await;
        };
        let endings = meanwhile(&cortex, killed).await;
        let known = |ending: &String| ["answer", "cut", "unreachable"].contains(&ending.as_str());
        assert!(endings.iter().all(known), "{endings:?}");
        cortex.replace().await;
        cortex.sees(&[("a", "up"), ("b", "up")]).await;
        let again = join_all((0..8).map(|_| ending(&cortex, "m", false))).await;
        assert!(again.iter().all(|ending| ending == "answer"), "{again:?}");
        until("nodes are left with nothing", || async {
            (a.open() + b.open() == 0).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_die_or_talk_nonsense_about_themselves_cost_no_answer() {
    let stays = FakeNode::start("stays").await.holding("m", 100);
    let mut other = FakeNode::start("other").await.holding("m", 100);
    let address = other.address;
    let nodes = [("stays", stays.address), ("other", address)];
    let cortex = Cortex::start(&nodes, "", QUICK_POLLS).await;
    let files = cortex.open_files();
    let both = [("stays", "up"), ("other", "up")];
    let one = [("stays", "up"), ("other", "down")];
    let disturb = async {
        for _ in 0..2 {
            drop(other);
            cortex.sees(&one).await;
            other = FakeNode::start_at("other", address).await.holding("m", 100);
            cortex.sees(&both).await;
            for manner in [Manner::Babbling, Manner::Mute] {
                other.manner(manner);
                cortex.sees(&one).await;
                other.manner(Manner::Honest);
                cortex.sees(&both).await;
            }
        }
    };
    let endings = meanwhile(&cortex, disturb).await;
    assert!(
        endings.iter().all(|ending| ending == "answer"),
        "{endings:?}"
    );
    nothing_is_left(&cortex, files, 8).await;
}

#[tokio::test]
async fn a_node_that_lies_about_its_memory_is_tried_once_and_another_one_answers() {
    let liar = FakeNode::start("liar").await.sized("large", 900);
    let honest = FakeNode::start("honest").await.sized("large", 900);
    let liar = liar.holding("other", 500);
    liar.manner(Manner::Boasting(1 << 40));
    let nodes = [("liar", liar.address), ("honest", honest.address)];
    let models = "[[models]]\nid = \"large\"\nsource = \"/models/large\"\nmemory = \"900B\"\n";
    let cortex = Cortex::start(&nodes, models, "").await;
    let files = cortex.open_files();
    let all = join_all((0..5).map(|_| ending(&cortex, "large", false))).await;
    assert!(all.iter().all(|ending| ending == "answer"), "{all:?}");
    assert_eq!(liar.changes(), ["load large"]);
    assert_eq!(honest.changes(), ["load large"]);
    nothing_is_left(&cortex, files, 5).await;
}

#[tokio::test]
async fn a_node_that_falls_silent_while_it_loads_is_given_up_and_another_one_loads() {
    let a = FakeNode::start("a").await;
    let b = FakeNode::start("b").await;
    a.loading(Loading::Held);
    let nodes = [("a", a.address), ("b", b.address)];
    let models = "[[models]]\nid = \"cold\"\nsource = \"/models/cold\"\nmemory = \"100B\"\n";
    // nobody would be told anything within the test's patience if the load's own bound were waited for
    let extra = format!("{QUICK_POLLS}[timeouts]\nload = \"10m\"\n");
    let cortex = Cortex::start(&nodes, models, &extra).await;
    let silence = async {
        until("a is told to load", || async {
            (a.changes() == ["load cold"]).then_some(())
        })
        .await;
        a.manner(Manner::Mute);
    };
    let asked = ending(&cortex, "cold", false);
    let (ending, ()) = futures::future::join(asked, silence).await;
    assert_eq!((ending.as_str(), b.changes().len()), ("answer", 1));
}

/// Asks with so many clients for so long; answers a second, and the 99th percentile of their times.
async fn drive(cortex: &Cortex, clients: usize, time: Duration) -> (f64, Duration) {
    let end = Instant::now() + time;
    let client = |_| async {
        let mut times = Vec::new();
        while Instant::now() < end {
            let began = Instant::now();
            match ending(cortex, "m", false).await.as_str() {
                "answer" => times.push(began.elapsed()),
                "429" => tokio::time::sleep(Duration::from_millis(50)).await, // what Retry-After asks for, sooner
                other => panic!("{other}"),
            }
        }
        times
    };
    let mut times = join_all((0..clients).map(client)).await.concat();
    times.sort_unstable();
    let late = times.get(times.len() * 99 / 100).copied();
    let goodput = times.len() as f64 / time.as_secs_f64();
    (goodput, late.unwrap_or_default())
}

/// Ten times what two nodes can do, without a clock: a node answers when it is told to, and whenever it has room it gets
/// somebody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_times_the_capacity_leaves_no_place_at_a_node_empty() {
    const PLACES: usize = 5;
    const ROUNDS: usize = 20;
    let nodes = [
        FakeNode::start("a").await.holding("m", 100),
        FakeNode::start("b").await.holding("m", 100),
    ];
    let script = |script: Script| nodes.iter().for_each(|node| node.script(script.clone()));
    script(Script::Places(PLACES));
    let at = [("a", nodes[0].address), ("b", nodes[1].address)];
    let cortex = Cortex::start(&at, "", PATIENT_POLLS).await;
    let files = cortex.open_files();
    let over = AtomicBool::new(false);
    let (answered, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let client = |_| async {
        while !over.load(Ordering::Relaxed) {
            match ending(&cortex, "m", false).await.as_str() {
                "answer" => answered.fetch_add(1, Ordering::Relaxed),
                "429" => refused.fetch_add(1, Ordering::Relaxed),
                other => panic!("{other}"),
            };
        }
    };
    let work = async {
        for round in 0..=ROUNDS {
            until("all who had a place are answered", || async {
                let all = round * nodes.len() * PLACES;
                (answered.load(Ordering::Relaxed) == all).then_some(())
            })
            .await;
            until("all places are taken again", || async {
                let full = nodes.iter().all(|node| node.open() >= PLACES);
                full.then_some(())
            })
            .await;
            if round < ROUNDS {
                nodes.iter().for_each(FakeNode::step);
            }
        }
        script(Script::Answer);
        over.store(true, Ordering::Relaxed);
        until("nobody is held any more", || async {
            nodes.iter().for_each(FakeNode::step);
            nodes.iter().all(|node| node.open() == 0).then_some(())
        })
        .await;
    };
    futures::future::join(join_all((0..100).map(client)), work).await;
    assert!(refused.into_inner() > 0, "there was ten times too much");
    let afterwards = join_all((0..100).map(|_| ending(&cortex, "m", false))).await;
    assert!(afterwards.iter().all(|ending| ending == "answer"));
    nothing_is_left(&cortex, files, 100).await;
}

/// Ten times what two nodes can do: goodput stays, what is admitted is quick, and afterwards all is as before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a minute and a half on a machine that does nothing else; `.ci/run --long` runs it"]
async fn ten_times_the_capacity_for_a_minute_leaves_nine_tenths_of_goodput() {
    const LEAST: f64 = 0.9;
    let time = Duration::from_secs(60);
    let work = Duration::from_millis(40);
    let nodes = [
        FakeNode::start("a").await.holding("m", 100),
        FakeNode::start("b").await.holding("m", 100),
    ];
    for node in &nodes {
        node.script(Script::Limited(5, work));
    }
    let at = [("a", nodes[0].address), ("b", nodes[1].address)];
    let cortex = Cortex::start(&at, "", "").await;
    let files = cortex.open_files();
    let (before, _) = drive(&cortex, 10, time / 4).await;
    let (during, late) = drive(&cortex, 100, time).await;
    let (after, _) = drive(&cortex, 10, Duration::from_secs(5)).await;
    println!(
        "answers a second: {before:.0}, overloaded {during:.0} (p99 {late:?}), after {after:.0}"
    );
    assert!(during >= LEAST * before, "{before} fell to {during}");
    assert!(after >= LEAST * before, "{before} came back as {after}");
    assert!(late < Duration::from_secs(2), "{late:?}");
    nothing_is_left(&cortex, files, 100).await;
}
