//! `cortex plan`: where each model of the catalogue would go if it were asked for now, and why. Nothing is done.

use super::ledger::{Change, Ledger, Reason};
use super::placement::{Placement, Survey, Use, Why, World, place};
use crate::config::Config;
use crate::fleet::FleetView;
use crate::status::{align, size};
use filters::route;
use protocol::node::ModelState;
use std::fmt::Write;
use std::sync::Arc;

/// The plan as a table.
pub(crate) fn plan(config: &Arc<Config>, view: &FleetView) -> String {
    let world = World {
        config,
        nodes: &view.nodes,
        now: route::now(),
        usage: &|_, _| Use::default(), // what others have there shows in the nodes' own counts
        leases: &|_| 0,
    };
    let (mut ledger, mut survey) = (Ledger::default(), Survey::default());
    ledger.see(&world);
    let mut rows = vec![["MODEL", "NODE", "DEVICES", "EACH", "EVICTS", "WHY"].map(String::from)];
    // what is pinned is loaded at start and takes its room from the others
    let mut order: Vec<_> = config.models.iter().collect();
    order.sort_by_key(|(_, model)| !model.is_pinned());
    for (id, model) in order {
        let there = view.nodes.iter().filter(|node| {
            let status = node.model(id).filter(|_| node.serves());
            status.is_some_and(|model| model.state == ModelState::Loaded)
        });
        let there: Vec<&str> = there.map(|node| &*node.name).collect();
        let places = match model.pinned_on.len() {
            _ if !there.is_empty() => 0,
            0 => 1,
            count => count,
        };
        if places == 0 {
            rows.push(row(id, &there.join(", "), "", "", "", "it is served there"));
        }
        for _ in 0..places {
            match place(id, model, &world, &ledger, &mut survey, &|_| false) {
                Placement::On(spot) => {
                    let each = match ledger.size(id, Some(model)) {
                        Some(_) => size(spot.share),
                        None => "?".into(),
                    };
                    let (devices, evicts) = (spot.devices.join(", "), spot.evict.join(", "));
                    let why = spot.why.to_string();
                    rows.push(row(id, &spot.node, &devices, &each, &evicts, &why));
                    if model.is_pinned() {
                        let change = Change {
                            node: spot.node,
                            evict: spot.evict,
                            load: Some(id.clone()),
                            devices: spot.devices,
                            share: (spot.why != Why::Joined && spot.share > 0)
                                .then_some(spot.share),
                            reason: Reason::Room,
                        };
                        ledger.begin(change, config);
                        survey = Survey::default();
                    }
                }
                Placement::Busy => rows.push(row(id, "", "", "", "", "all room is in use now")),
                Placement::NoNode => {
                    rows.push(row(id, "", "", "", "", "no node is up that may have it"));
                }
                Placement::TooLarge {
                    devices,
                    share,
                    largest,
                } => {
                    let mut why = format!("it needs {} on {devices} device(s)", size(share));
                    let _ = write!(why, ", the largest has {}", size(largest)); // a String takes all
                    rows.push(row(id, "", "", "", "", &why));
                }
            }
        }
    }
    let mut text = String::new();
    if rows.len() > 1 {
        align(&mut text, &rows);
    } else {
        text.push_str("the catalogue is empty\n");
    }
    text
}

fn row(id: &str, node: &str, devices: &str, each: &str, evicts: &str, why: &str) -> [String; 6] {
    [id, node, devices, each, evicts, why].map(String::from)
}
