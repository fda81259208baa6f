//! What models there are: those of the catalogue, and those that nodes have loaded on their own.

use crate::config::Config;
use crate::fleet::{Fleet, FleetView};
use crate::lifecycle::Lifecycle;
use filters::resolve::{self, Named};
use protocol::models::ModelCard;
use protocol::node::ModelState;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// The catalogue of one configuration over the living fleet.
pub(crate) struct Catalogue {
    config: Arc<Config>,
    aliases: HashMap<Arc<str>, Arc<str>>,
    fleet: Arc<Fleet>,
    lifecycle: Arc<Lifecycle>,
    /// When this catalogue was built: `created` of its models.
    since: u64,
}

impl Catalogue {
    pub(crate) fn new(config: Arc<Config>, fleet: Arc<Fleet>, lifecycle: Arc<Lifecycle>) -> Self {
        let aliases = config
            .models
            .iter()
            .flat_map(|(id, model)| {
                model
                    .aliases
                    .iter()
                    .map(|alias| (alias.clone(), id.clone()))
            })
            .collect();
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |time| time.as_secs());
        Self {
            config,
            aliases,
            fleet,
            lifecycle,
            since,
        }
    }
}

impl Catalogue {
    /// The first of these models that is served or may still come, and those after it; if none is, all.
    fn first_of(&self, models: &[Arc<str>]) -> Option<Named> {
        let view = self.fleet.view();
        let had = |id: &Arc<str>| view.served(id).is_some() || !self.lifecycle.is_hopeless(id);
        let first = models.iter().position(had).unwrap_or(0);
        let (id, others) = models[first..].split_first()?;
        Some(Named {
            id: id.clone(),
            others: others.to_vec(),
        })
    }
}

impl resolve::Catalogue for Catalogue {
    fn resolve(&self, name: &str) -> Option<Named> {
        if let Some(id) = self.aliases.get(name) {
            return Some(id.clone().into());
        }
        if let Some(models) = self.config.fallbacks.get(name) {
            return self.first_of(models);
        }
        if let Some((id, _)) = self.config.models.get_key_value(name) {
            return Some(id.clone().into());
        }
        self.fleet.view().served_id(name).map(Named::from)
    }

    fn cards(&self) -> Vec<ModelCard> {
        cards(&self.config, &self.fleet.view(), self.since)
    }
}

/// One card a model: where it is, in which state, and whether it could be loaded.
fn cards(config: &Config, view: &FleetView, since: u64) -> Vec<ModelCard> {
    let mut cards: BTreeMap<&str, ModelCard> = BTreeMap::new();
    for (id, model) in &config.models {
        let card = cards
            .entry(id)
            .or_insert_with(|| ModelCard::new(&**id, "cortex", since));
        card.state = Some("available".into());
        card.context_length = model.context_length;
    }
    for node in view.nodes.iter().filter(|node| node.is_up()) {
        for model in &node.models {
            let known = config.models.contains_key(&*model.id);
            if !known && model.state != ModelState::Loaded {
                continue; // a name that nobody can ask for with success
            }
            let card = cards
                .entry(&model.id)
                .or_insert_with(|| ModelCard::new(&*model.id, "cortex", model.since));
            if model.state == ModelState::Loaded {
                card.nodes.push(node.name.to_string());
                card.context_length = Some(model.context_length).filter(|length| *length > 0);
                card.state = Some(model.state.as_str().into());
                if !model.capabilities.is_empty() {
                    card.capabilities = Some(model.capabilities.clone());
                }
            } else if card.nodes.is_empty() {
                card.state = Some(model.state.as_str().into());
            }
        }
    }
    cards.into_values().collect()
}
