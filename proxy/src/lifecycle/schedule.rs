//! What to do about wanted and unwanted models: decisions over values, without socket, clock or lock.
//!
//! [`Schedule`] remembers who waits and what has been begun; it acts through [`Hands`], which are the fleet's in the
//! daemon and a simulated fleet's in tests.

use super::ledger::{Change, Holding, Ledger, Reason};
use super::placement::{self, Placement, Spot, Survey, Use, Why, World};
use crate::config::{Config, Model};
use protocol::node::ModelState;
use protocol::{ApiError, ErrorKind};
use std::collections::HashMap;
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
    ledger: Ledger,
    pinned: Option<Pinned>,
    /// Failed loads by model, then by node.
    failed: HashMap<Arc<str>, HashMap<Arc<str>, Failure>>,
    /// By node.
    cycles: HashMap<Arc<str>, Cycles>,
    /// When a model (second) on a node (first) was last seen in use, or first seen at all.
    seen_busy: HashMap<(Arc<str>, Arc<str>), Seen>,
    /// Since when a model has had too few replicas, or too many.
    tide: HashMap<Arc<str>, Tide>,
}

/// Models that the catalogue pins, found once for each configuration.
struct Pinned {
    config: Arc<Config>,
    models: Vec<Arc<str>>,
}

impl Pinned {
    fn of(config: &Arc<Config>) -> Self {
        let models = config.models.iter().filter(|(_, model)| model.is_pinned());
        Self {
            models: models.map(|(id, _)| id.clone()).collect(),
            config: config.clone(),
        }
    }
}

#[derive(Debug)]
struct Seen {
    busy: u64,
    /// The last time that it was there.
    there: u64,
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
            ledger: Ledger::default(),
            pinned: None,
            failed: HashMap::new(),
            cycles: HashMap::new(),
            seen_busy: HashMap::new(),
            tide: HashMap::new(),
        }
    }
}

pub(super) fn nanos(length: Duration) -> u64 {
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

    #[cfg(test)]
    pub(super) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// A change is over, and the fleet's view shows it.
    pub(crate) fn ended(&mut self, ended: Ended<'_>) {
        self.ledger.end(ended.node, ended.load, ended.evict);
        let Some(model) = ended.load else { return };
        self.cycles.entry(ended.node.clone()).or_default().loads += 1;
        match ended.failure {
            None => {
                if let Some(nodes) = self.failed.get_mut(model) {
                    nodes.remove(ended.node);
                }
            }
            Some(reason) => {
                let nodes = self.failed.entry(model.into()).or_default();
                let times = nodes.get(ended.node).map_or(0, |failure| failure.times);
                let wait = BACKOFF
                    .saturating_mul(1 << times.min(16))
                    .min(LONGEST_BACKOFF);
                let failure = Failure {
                    until: ended.now.saturating_add(nanos(wait)),
                    times: times + 1,
                    reason,
                };
                nodes.insert(ended.node.clone(), failure);
            }
        }
    }

    /// Decides about all that is wanted. What has not changed since the last time, and is not wanted, costs next to nothing.
    pub(crate) fn step(&mut self, world: &World<'_>, hands: &mut impl Hands<W>) {
        self.ledger.see(world);
        let pinned = match self.pinned.take() {
            Some(pinned) if Arc::ptr_eq(&pinned.config, world.config) => pinned,
            _ => Pinned::of(world.config),
        };
        let forget = nanos(LONGEST_BACKOFF);
        self.failed.retain(|_, nodes| {
            nodes.retain(|_, failure| failure.until.saturating_add(forget) > world.now);
            !nodes.is_empty()
        });
        self.pin(&pinned, world, hands);
        self.pinned = Some(pinned);
        let mut order: Vec<(u64, Arc<str>)> = (self.wanted.iter())
            .map(|(model, wanted)| (wanted.arrival, model.clone()))
            .collect();
        order.sort_unstable();
        // first all that can be served, so that what has just come is in use before room is made for others
        order.retain(|(_, model)| !self.serve(model, hands));
        let mut survey = Survey::default();
        for (_, model) in order {
            self.bring(&model, world, &mut survey, hands);
        }
    }

    /// Decides about all that nobody waits for: a look at each model that is somewhere, for now and then.
    pub(crate) fn tidy(&mut self, world: &World<'_>, hands: &mut impl Hands<W>) {
        self.ledger.see(world);
        let mut survey = Survey::default();
        self.unload_idle(world, &mut survey, hands);
        self.adjust_replicas(world, &mut survey, hands);
        self.defragment(world, &mut survey, hands);
    }

    /// Wants what the catalogue pins.
    fn pin(&mut self, pinned: &Pinned, world: &World<'_>, hands: &mut impl Hands<W>) {
        let mut survey = Survey::default();
        for id in &pinned.models {
            let Some(model) = world.config.models.get(id) else {
                continue;
            };
            if model.pinned_on.is_empty() {
                if self.ledger.staying(id) == 0 {
                    self.wanted_mut(id.clone());
                }
                continue;
            }
            for node in &model.pinned_on {
                if self.ledger.stays_on(node, id) {
                    continue;
                }
                let only = |other: &str| *other != **node;
                if let Placement::On(spot) = self.place(id, model, world, &mut survey, &only) {
                    self.start(Some(id), spot, Reason::Room, world, &mut survey, hands);
                }
            }
        }
    }

    /// Gives a served model to whoever waits for it.
    fn serve(&mut self, model: &Arc<str>, hands: &mut impl Hands<W>) -> bool {
        if self.ledger.staying(model) == 0 {
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
    fn bring(
        &mut self,
        model: &Arc<str>,
        world: &World<'_>,
        survey: &mut Survey,
        hands: &mut impl Hands<W>,
    ) {
        let Some(wanted) = self.wanted.get_mut(model) else {
            return;
        };
        let entry = world.config.models.get(model);
        wanted.waiters.retain(|waiter| !hands.has_left(waiter));
        if wanted.waiters.is_empty() && !entry.is_some_and(Model::is_pinned) {
            self.wanted.remove(model); // nobody is interested any more
            return;
        }
        if self.ledger.coming(model) > 0 {
            return;
        }
        let Some(entry) = entry else {
            return self.refuse(model, &Refusal::Unknown(model.clone()), hands);
        };
        if let Some(spot) = self.joined(model, world) {
            self.start(Some(model), spot, Reason::Room, world, survey, hands);
            return;
        }
        let failures = self.failures(model, world.now);
        if failures.len() >= NODES_TRIED {
            return self.refuse(model, &told(&failures, world.now), hands);
        }
        match self.place(model, entry, world, survey, &|_| false) {
            Placement::On(spot) => {
                self.start(Some(model), spot, Reason::Room, world, survey, hands);
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
        let held = self.ledger.there(model).iter();
        let mut loading = held.filter(|held| held.state == ModelState::Loading);
        let (node, status) = loading.find_map(|held| {
            let node = &world.nodes[held.node];
            let status = node.model(model)?;
            (node.can_load() && !failed(&node.name)).then_some((node, status))
        })?;
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
        survey: &mut Survey,
        except: &dyn Fn(&str) -> bool,
    ) -> Placement {
        let failed = self.failed_now(id, world.now);
        let not_there = |node: &str| except(node) || failed(node);
        placement::place(id, model, world, &self.ledger, survey, &not_there)
    }

    fn failed_now(&self, model: &str, now: u64) -> impl Fn(&str) -> bool {
        let nodes = self.failed.get(model);
        move |node| nodes.is_some_and(|nodes| nodes.get(node).is_some_and(|f| f.until > now))
    }

    fn failures(&self, model: &str, now: u64) -> Vec<&Failure> {
        let failures = self.failed.get(model).into_iter().flatten();
        failures
            .map(|(_, failure)| failure)
            .filter(|failure| failure.until > now)
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
        world: &World<'_>,
        survey: &mut Survey,
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
        // what leaves here may be the last replica but one elsewhere
        let leaving = change.evict.iter();
        let nodes = leaving.flat_map(|model| self.ledger.there(model));
        nodes.for_each(|held| survey.forget(held.node));
        if let Some(at) = self.ledger.find(&change.node) {
            survey.forget(at);
        }
        self.ledger.begin(change, world.config);
        true
    }

    fn unload(
        &mut self,
        node: &Arc<str>,
        models: Vec<Arc<str>>,
        reason: Reason,
        world: &World<'_>,
        survey: &mut Survey,
        hands: &mut impl Hands<W>,
    ) -> bool {
        let spot = Spot {
            node: node.clone(),
            devices: Vec::new(),
            share: 0,
            evict: models,
            why: Why::MostRoom,
        };
        self.start(None, spot, reason, world, survey, hands)
    }

    /// Lets models go that nobody has used for as long as the catalogue says.
    fn unload_idle(&mut self, world: &World<'_>, survey: &mut Survey, hands: &mut impl Hands<W>) {
        let now = world.now;
        let mut due = Vec::new();
        for number in self.ledger.somewhere() {
            let holding = self.ledger.holding(number);
            let Some(keep_alive) = holding.rule.keep_alive else {
                continue;
            };
            let id = &holding.name;
            let last = self.ledger.staying_on(holding).nth(1).is_none();
            let leased = last && ((world.leases)(id) > 0 || self.wanted.contains_key(id));
            let staying = self.ledger.staying_on(holding).map(|account| &account.node);
            for node in staying.filter(|node| node.can_load()) {
                let Use { active, last_used } = (world.usage)(&node.name, id);
                let elsewhere = node.model(id).map_or(0, |status| status.in_flight);
                let key = (node.name.clone(), id.clone());
                let seen = (self.seen_busy.entry(key.clone())).or_insert(Seen {
                    busy: now,
                    there: now,
                });
                seen.there = now;
                if active > 0 || elsewhere > 0 || leased {
                    seen.busy = now;
                }
                if now.saturating_sub(last_used.max(seen.busy)) >= keep_alive {
                    due.push(key);
                }
            }
        }
        self.seen_busy.retain(|_, seen| seen.there == now);
        for (node, model) in due {
            if !self.ledger.stays_on(&node, &model) {
                continue; // a node that tells of it twice
            }
            self.unload(&node, vec![model], Reason::Idle, world, survey, hands);
        }
    }

    /// Gives a hot model another replica where there is room for it, and takes one away when the others can do its work.
    fn adjust_replicas(
        &mut self,
        world: &World<'_>,
        survey: &mut Survey,
        hands: &mut impl Hands<W>,
    ) {
        let limits = world.config.replicas;
        let now = world.now;
        self.tide.retain(|id, _| self.ledger.staying(id) > 0);
        let several = |number: &usize| self.ledger.holding(*number).rule.several;
        let several: Vec<usize> = self.ledger.somewhere().filter(several).collect();
        for number in several {
            let holding = self.ledger.holding(number);
            let count = self.ledger.staying_on(holding).count();
            let (queue, idlest) = self.queue(holding, world);
            let id = &holding.name.clone();
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
                    if let Some(model) = world.config.models.get(id)
                        && count + self.ledger.coming(id) < model.max_replicas
                        && let Placement::On(spot) =
                            self.place(id, model, world, survey, &|_| false)
                        && spot.evict.is_empty()
                        && self.start(Some(id), spot, Reason::Replicas, world, survey, hands)
                    {
                        self.tide.remove(id);
                    }
                }
                Tide::Low(since) if now - since >= nanos(limits.retire_after) => {
                    if let Some(node) = idlest {
                        let models = vec![id.clone()];
                        if self.unload(&node, models, Reason::Replicas, world, survey, hands) {
                            self.tide.remove(id);
                        }
                    }
                }
                _ => {}
            }
        }
    }

    /// Requests that a model's replicas have, and the node of the one with the fewest.
    fn queue(&self, holding: &Holding, world: &World<'_>) -> (usize, Option<Arc<str>>) {
        let id = &holding.name;
        let mut queue = 0;
        let mut idlest: Option<((usize, u64), Arc<str>)> = None;
        let staying = self.ledger.staying_on(holding).map(|account| &account.node);
        for node in staying.filter(|node| node.can_load()) {
            let Use { active, last_used } = (world.usage)(&node.name, id);
            let elsewhere = node.model(id).map_or(0, |status| status.in_flight);
            let there = active.max(usize::try_from(elsewhere).unwrap_or(usize::MAX));
            queue += there;
            if (idlest.as_ref()).is_none_or(|(least, _)| (there, last_used) < *least) {
                idlest = Some(((there, last_used), node.name.clone()));
            }
        }
        (queue, idlest.map(|(_, node)| node))
    }

    /// Clears nodes that have seen many loads, serve nobody now, and have less memory than they should.
    fn defragment(&mut self, world: &World<'_>, survey: &mut Survey, hands: &mut impl Hands<W>) {
        let limit = world.config.eviction.defrag_after_cycles;
        if limit == 0 {
            return;
        }
        for (at, node) in world.nodes.iter().enumerate() {
            if !node.can_load() || self.ledger.accounts()[at].changing {
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
            let residents = survey.of(at, world, &self.ledger);
            if residents.is_empty() || residents.iter().any(|resident| resident.kept) {
                continue;
            }
            *cycles = Cycles::default();
            let models = residents.iter().map(|resident| resident.model.clone());
            let (models, reason) = (models.collect(), Reason::Defragmentation);
            self.unload(&node.name, models, reason, world, survey, hands);
        }
        let ledger = &self.ledger;
        self.cycles.retain(|node, _| ledger.find(node).is_some());
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
