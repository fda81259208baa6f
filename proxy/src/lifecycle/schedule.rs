//! What to do about wanted and unwanted models: decisions over values, without socket, clock or lock.
//!
//! [`Schedule`] remembers who waits and what has been begun; it acts through [`Hands`], which are the fleet's in the
//! daemon and a simulated fleet's in tests.

use super::placement::{self, Begun, Change, Placement, Reason, Sizes, Spot, Use, Why, World};
use crate::config::Model;
use crate::fleet::NodeView;
use protocol::node::ModelState;
use protocol::{ApiError, ErrorKind};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

/// After a failed load, how long the model is not tried on that node again; doubled for each further failure.
pub(super) const BACKOFF: Duration = Duration::from_secs(10);
/// The longest that becomes.
const LONGEST_BACKOFF: Duration = Duration::from_secs(600);
/// Nodes on which a model may fail before whoever waits is told.
const NODES_TRIED: usize = 2;
/// Share of a node's memory that may be missing after loads before that counts as memory that did not come back.
const LOST: f64 = 0.05;

/// Why a model will not come.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("the model `{0}` is not in the catalogue, and no node serves it any more")]
    Unknown(Arc<str>),
    #[error("the model needs {} on {}, the largest in the fleet has {}", size(*.share), many(*.devices), size(*.largest))]
    TooLarge {
        devices: usize,
        share: u64,
        largest: u64,
    },
    #[error("no node is up that could load the model")]
    NoNode,
    #[error("the model could not be loaded: {0}")]
    LoadFailed(String, Duration),
}

fn size(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}

fn many(devices: usize) -> String {
    match devices {
        1 => "one device".into(),
        count => format!("each of {count} devices of one node"),
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let error = Self::new(ErrorKind::Unavailable, refusal.to_string());
        match refusal {
            Refusal::Unknown(model) => Self::model_not_found(&model),
            Refusal::TooLarge { .. } => error,
            Refusal::NoNode => error.retry_after(Duration::from_secs(2)),
            Refusal::LoadFailed(_, left) => error.retry_after(left),
        }
    }
}

/// What the schedule acts through. `W` is somebody who waits for a model.
pub(crate) trait Hands<W> {
    /// The model is served: lets `waiter` use it, or gives it back if that cannot be now.
    fn serve(&mut self, model: &Arc<str>, waiter: W) -> Option<W>;
    /// The model will not come.
    fn refuse(&mut self, model: &Arc<str>, waiters: Vec<W>, refusal: &Refusal);
    /// Whether nobody is interested in this answer any more.
    fn has_left(&self, waiter: &W) -> bool;
    /// Sends no new requests for `models` to `node`. Unless they may `drain`, nobody may be using them: `false` if
    /// somebody is, and then nothing has changed.
    fn leave(&mut self, node: &Arc<str>, models: &[Arc<str>], drain: bool) -> bool;
    /// Begins a change, after [`Self::leave`]. Its end is told by [`Schedule::ended`].
    fn begin(&mut self, change: &Change);
}

/// See the module.
pub(crate) struct Schedule<W> {
    wanted: HashMap<Arc<str>, Wanted<W>>,
    arrivals: u64,
    begun: Begun,
    sizes: Sizes,
    /// Failed loads by model and node.
    failed: HashMap<(Arc<str>, Arc<str>), Failure>,
    /// By node.
    cycles: HashMap<Arc<str>, Cycles>,
    /// When a model (second) on a node (first) was last seen in use, or first seen at all.
    seen_busy: HashMap<(Arc<str>, Arc<str>), u64>,
    /// Since when a model has had too few replicas, or too many.
    tide: HashMap<Arc<str>, Tide>,
}

struct Wanted<W> {
    arrival: u64,
    waiters: Vec<W>,
}

#[derive(Debug)]
struct Failure {
    until: u64,
    times: u32,
    reason: String,
}

#[derive(Debug, Default)]
struct Cycles {
    loads: u32,
    /// Least memory that no model accounted for.
    unaccounted: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tide {
    High(u64),
    Low(u64),
}

/// How a change ended.
pub(crate) struct Ended<'a> {
    pub(crate) node: &'a Arc<str>,
    pub(crate) load: Option<&'a str>,
    pub(crate) evict: &'a [Arc<str>],
    /// Why it failed.
    pub(crate) failure: Option<String>,
    pub(crate) now: u64,
}

impl<W> Default for Schedule<W> {
    fn default() -> Self {
        Self {
            wanted: HashMap::new(),
            arrivals: 0,
            begun: Begun::default(),
            sizes: Sizes::default(),
            failed: HashMap::new(),
            cycles: HashMap::new(),
            seen_busy: HashMap::new(),
            tide: HashMap::new(),
        }
    }
}

fn nanos(length: Duration) -> u64 {
    u64::try_from(length.as_nanos()).unwrap_or(u64::MAX)
}

impl<W> Schedule<W> {
    /// Somebody waits for `model`.
    pub(crate) fn want(&mut self, model: Arc<str>, waiter: W) {
        self.wanted_mut(model).waiters.push(waiter);
    }

    fn wanted_mut(&mut self, model: Arc<str>) -> &mut Wanted<W> {
        self.arrivals += 1;
        self.wanted.entry(model).or_insert(Wanted {
            arrival: self.arrivals,
            waiters: Vec::new(),
        })
    }

    /// A change is over, and the fleet's view shows it.
    pub(crate) fn ended(&mut self, ended: Ended<'_>) {
        self.begun.end(ended.node, ended.load, ended.evict);
        let Some(model) = ended.load else { return };
        self.cycles.entry(ended.node.clone()).or_default().loads += 1;
        let key = (Arc::from(model), ended.node.clone());
        match ended.failure {
            None => drop(self.failed.remove(&key)),
            Some(reason) => {
                let times = self.failed.get(&key).map_or(0, |failure| failure.times);
                let wait = BACKOFF
                    .saturating_mul(1 << times.min(16))
                    .min(LONGEST_BACKOFF);
                let failure = Failure {
                    until: ended.now.saturating_add(nanos(wait)),
                    times: times + 1,
                    reason,
                };
                self.failed.insert(key, failure);
            }
        }
    }

    /// Decides about everything, once.
    pub(crate) fn step(&mut self, world: &World<'_>, hands: &mut impl Hands<W>) {
        self.sizes.learn(world.nodes);
        self.begun.look(world.nodes);
        let forget = nanos(LONGEST_BACKOFF);
        self.failed
            .retain(|_, failure| failure.until.saturating_add(forget) > world.now);
        self.pin(world, hands);
        let mut order: Vec<(u64, Arc<str>)> = (self.wanted.iter())
            .map(|(model, wanted)| (wanted.arrival, model.clone()))
            .collect();
        order.sort_unstable();
        // first all that can be served, so that what has just come is in use before room is made for others
        order.retain(|(_, model)| !self.serve(model, hands));
        for (_, model) in order {
            self.bring(&model, world, hands);
        }
        self.unload_idle(world, hands);
        self.adjust_replicas(world, hands);
        self.defragment(world, hands);
    }

    /// Wants what the catalogue pins.
    fn pin(&mut self, world: &World<'_>, hands: &mut impl Hands<W>) {
        let pinned = world.config.models.iter().filter(|(_, m)| m.is_pinned());
        for (id, model) in pinned {
            if model.pinned_on.is_empty() {
                if self.begun.staying(id) == 0 {
                    self.wanted_mut(id.clone());
                }
                continue;
            }
            for node in &model.pinned_on {
                let only = |other: &str| *other != **node;
                if let Placement::On(spot) = self.place(id, model, world, &only) {
                    self.start(Some(id), spot, Reason::Room, hands);
                }
            }
        }
    }

    /// Gives a served model to whoever waits for it.
    fn serve(&mut self, model: &Arc<str>, hands: &mut impl Hands<W>) -> bool {
        if self.begun.staying(model) == 0 {
            return false;
        }
        if let Some(mut wanted) = self.wanted.remove(model) {
            let waiters = wanted.waiters.drain(..);
            let back: Vec<W> = waiters
                .filter_map(|waiter| hands.serve(model, waiter))
                .collect();
            if !back.is_empty() {
                wanted.waiters = back;
                self.wanted.insert(model.clone(), wanted);
            }
        }
        true
    }

    /// Does the next thing about a model that is wanted and not served.
    fn bring(&mut self, model: &Arc<str>, world: &World<'_>, hands: &mut impl Hands<W>) {
        let Some(wanted) = self.wanted.get_mut(model) else {
            return;
        };
        let entry = world.config.models.get(model);
        wanted.waiters.retain(|waiter| !hands.has_left(waiter));
        if wanted.waiters.is_empty() && !entry.is_some_and(Model::is_pinned) {
            self.wanted.remove(model); // nobody is interested any more
            return;
        }
        if self.begun.coming(model) > 0 {
            return;
        }
        let Some(entry) = entry else {
            return self.refuse(model, &Refusal::Unknown(model.clone()), hands);
        };
        if let Some(spot) = self.joined(model, world) {
            self.start(Some(model), spot, Reason::Room, hands);
            return;
        }
        let failures = self.failures(model, world.now);
        if failures.len() >= NODES_TRIED {
            return self.refuse(model, &told(&failures, world.now), hands);
        }
        match self.place(model, entry, world, &|_| false) {
            Placement::On(spot) => {
                self.start(Some(model), spot, Reason::Room, hands);
            }
            Placement::Busy => {}
            Placement::TooLarge {
                devices,
                share,
                largest,
            } => {
                let refusal = Refusal::TooLarge {
                    devices,
                    share,
                    largest,
                };
                self.refuse(model, &refusal, hands);
            }
            Placement::NoNode if failures.is_empty() => {
                self.refuse(model, &Refusal::NoNode, hands);
            }
            Placement::NoNode => self.refuse(model, &told(&failures, world.now), hands),
        }
    }

    /// Where another gateway, or a person, has the model loaded now: that load is joined.
    fn joined(&self, model: &Arc<str>, world: &World<'_>) -> Option<Spot> {
        let failed = self.failed_now(model, world.now);
        let loading = world.nodes.iter().find_map(|node| {
            let status = node.model(model)?;
            let loading = status.state == ModelState::Loading;
            (node.can_load() && loading && !failed(&node.name)).then_some((node, status))
        });
        let (node, status) = loading?;
        Some(Spot {
            node: node.name.clone(),
            devices: status.devices.iter().map(|id| id.as_str().into()).collect(),
            share: 0, // its memory is already counted where it is taken
            evict: Vec::new(),
            why: Why::Joined,
        })
    }

    fn place(
        &self,
        id: &Arc<str>,
        model: &Model,
        world: &World<'_>,
        except: &dyn Fn(&str) -> bool,
    ) -> Placement {
        let failed = self.failed_now(id, world.now);
        let not_there = |node: &str| except(node) || failed(node);
        placement::place(id, model, world, &self.begun, &self.sizes, &not_there)
    }

    fn failed_now<'a>(&'a self, model: &'a Arc<str>, now: u64) -> impl Fn(&str) -> bool + 'a {
        move |node| {
            let key = (model.clone(), Arc::from(node));
            !self.failed.is_empty() && self.failed.get(&key).is_some_and(|f| f.until > now)
        }
    }

    fn failures(&self, model: &str, now: u64) -> Vec<&Failure> {
        let failed = self.failed.iter();
        failed
            .filter(|((failed, _), failure)| **failed == *model && failure.until > now)
            .map(|(_, failure)| failure)
            .collect()
    }

    fn refuse(&mut self, model: &Arc<str>, refusal: &Refusal, hands: &mut impl Hands<W>) {
        if let Some(wanted) = self.wanted.remove(model) {
            hands.refuse(model, wanted.waiters, refusal);
        }
    }

    /// Begins a change, if those who have to leave are still unused.
    fn start(
        &mut self,
        load: Option<&Arc<str>>,
        spot: Spot,
        reason: Reason,
        hands: &mut impl Hands<W>,
    ) -> bool {
        let drain = reason == Reason::Replicas && load.is_none();
        if !hands.leave(&spot.node, &spot.evict, drain) {
            return false;
        }
        let known = spot.why == Why::Joined || spot.share > 0 || load.is_none();
        let change = Change {
            node: spot.node,
            evict: spot.evict,
            load: load.cloned(),
            devices: spot.devices,
            share: known.then_some(spot.share),
            reason,
        };
        hands.begin(&change);
        self.begun.begin(change);
        true
    }

    fn unload(
        &mut self,
        node: &Arc<str>,
        models: Vec<Arc<str>>,
        reason: Reason,
        hands: &mut impl Hands<W>,
    ) -> bool {
        let spot = Spot {
            node: node.clone(),
            devices: Vec::new(),
            share: 0,
            evict: models,
            why: Why::MostRoom,
        };
        self.start(None, spot, reason, hands)
    }

    /// Lets models go that nobody has used for as long as the catalogue says.
    fn unload_idle(&mut self, world: &World<'_>, hands: &mut impl Hands<W>) {
        if world
            .config
            .models
            .values()
            .all(|model| model.keep_alive.is_none())
        {
            return;
        }
        let mut there = HashSet::new();
        let mut due = Vec::new();
        for node in world.nodes.iter().filter(|node| node.can_load()) {
            for status in &node.models {
                let entry = world.config.models.get_key_value(status.id.as_str());
                let Some((id, keep_alive)) = entry.and_then(|(id, model)| {
                    let keep_alive = model.keep_alive.filter(|_| !model.is_pinned());
                    Some((id.clone(), keep_alive?))
                }) else {
                    continue;
                };
                if status.state != ModelState::Loaded || self.begun.is_leaving(&node.name, &id) {
                    continue;
                }
                let Use { active, last_used } = (world.usage)(&node.name, &id);
                let last = self.begun.staying(&id) < 2;
                let leased = last && ((world.leases)(&id) > 0 || self.wanted.contains_key(&id));
                let key = (node.name.clone(), id);
                let seen = self.seen_busy.entry(key.clone()).or_insert(world.now);
                if active > 0 || status.in_flight > 0 || leased {
                    *seen = world.now;
                }
                let idle = world.now.saturating_sub(last_used.max(*seen));
                if idle >= nanos(keep_alive) {
                    due.push(key.clone());
                }
                there.insert(key);
            }
        }
        self.seen_busy.retain(|key, _| there.contains(key));
        for (node, model) in due {
            self.unload(&node, vec![model], Reason::Idle, hands);
        }
    }

    /// Gives a hot model another replica where there is room for it, and takes one away when the others can do its work.
    fn adjust_replicas(&mut self, world: &World<'_>, hands: &mut impl Hands<W>) {
        let limits = world.config.replicas;
        let several = |model: &&Model| model.max_replicas > 1 && model.pinned_on.is_empty();
        let models = world.config.models.iter().filter(|(_, m)| several(m));
        for (id, model) in models {
            let count = self.begun.staying(id);
            let (queue, idlest) = self.queue(id, world);
            let now = world.now;
            let high = count > 0 && queue > limits.above * count;
            let low = count > 1 && 2 * queue <= limits.above * (count - 1);
            let tide = match (high, low, self.tide.get(id)) {
                (true, _, Some(Tide::High(since))) => Tide::High(*since),
                (true, _, _) => Tide::High(now),
                (_, true, Some(Tide::Low(since))) => Tide::Low(*since),
                (_, true, _) => Tide::Low(now),
                _ => {
                    self.tide.remove(id);
                    continue;
                }
            };
            self.tide.insert(id.clone(), tide);
            match tide {
                Tide::High(since) if now - since >= nanos(limits.after) => {
                    if count + self.begun.coming(id) < model.max_replicas
                        && let Placement::On(spot) = self.place(id, model, world, &|_| false)
                        && spot.evict.is_empty()
                        && self.start(Some(id), spot, Reason::Replicas, hands)
                    {
                        self.tide.remove(id);
                    }
                }
                Tide::Low(since) if now - since >= nanos(limits.retire_after) => {
                    if let Some(node) = idlest
                        && self.unload(&node, vec![id.clone()], Reason::Replicas, hands)
                    {
                        self.tide.remove(id);
                    }
                }
                _ => {}
            }
        }
    }

    /// Requests that a model's replicas have, and the node of the one with the fewest.
    fn queue(&self, id: &Arc<str>, world: &World<'_>) -> (usize, Option<Arc<str>>) {
        let mut queue = 0;
        let mut idlest: Option<((usize, u64), &NodeView)> = None;
        for node in world.nodes.iter().filter(|node| node.can_load()) {
            let Some(status) = node.model(id) else {
                continue;
            };
            if status.state != ModelState::Loaded || self.begun.is_leaving(&node.name, id) {
                continue;
            }
            let Use { active, last_used } = (world.usage)(&node.name, id);
            let there = active.max(usize::try_from(status.in_flight).unwrap_or(usize::MAX));
            queue += there;
            if idlest.is_none_or(|(least, _)| (there, last_used) < least) {
                idlest = Some(((there, last_used), node));
            }
        }
        (queue, idlest.map(|(_, node)| node.name.clone()))
    }

    /// Clears nodes that have seen many loads, serve nobody now, and have less memory than they should.
    fn defragment(&mut self, world: &World<'_>, hands: &mut impl Hands<W>) {
        let limit = world.config.eviction.defrag_after_cycles;
        if limit == 0 {
            return;
        }
        for node in world.nodes.iter().filter(|node| node.can_load()) {
            if !self.begun.on(&node.name).is_empty() {
                continue;
            }
            let all: u64 = node.devices.iter().map(|device| device.total_bytes).sum();
            let free: u64 = node.devices.iter().map(|device| device.free_bytes).sum();
            let held: u64 = node.models.iter().map(|model| model.memory_bytes).sum();
            let unaccounted = all.saturating_sub(free).saturating_sub(held);
            let cycles = self.cycles.entry(node.name.clone()).or_default();
            let least = cycles
                .unaccounted
                .map_or(unaccounted, |l| l.min(unaccounted));
            cycles.unaccounted = Some(least);
            let lost = (unaccounted - least) as f64 > LOST * all as f64;
            if cycles.loads < limit || !lost || !self.wanted.is_empty() {
                continue;
            }
            let residents = placement::residents(node, world, &self.begun);
            if residents.is_empty() || residents.iter().any(|resident| resident.kept) {
                continue;
            }
            *cycles = Cycles::default();
            let models = residents.into_iter().map(|resident| resident.model);
            self.unload(&node.name, models.collect(), Reason::Defragmentation, hands);
        }
        let known = |name: &Arc<str>| world.nodes.iter().any(|node| node.name == *name);
        self.cycles.retain(|node, _| known(node));
    }
}

/// What whoever waits is told of failed loads.
fn told(failures: &[&Failure], now: u64) -> Refusal {
    let latest = failures.iter().max_by_key(|failure| failure.until);
    let soonest = failures.iter().map(|failure| failure.until).min();
    Refusal::LoadFailed(
        latest.map_or_else(String::new, |failure| failure.reason.clone()),
        Duration::from_nanos(soonest.unwrap_or(now).saturating_sub(now)),
    )
}
