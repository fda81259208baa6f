//! The engine's thread: inbox → plan → run → commit → emit, until it is told to end.

use super::admission::Ticket;
use super::drafts::Drafter;
use super::guide::{Guide, Next};
use super::metrics::ModelMetrics;
use super::pace::Pace;
use super::plan::Plan;
use super::request::{EngineError, Finish, Request, Sink};
use super::runner::{Drafting, Logits, ModelRunner};
use super::sampler::{Bounds, NotANumber, Sampler, score};
use super::scheduler::{self, Scheduler};
use super::sequence::{Sequence, SequenceId};
use super::{Command, EngineConfig};
use crate::kernels::choose::Rule;
use crate::model::{CausalLm, ModelError};
use crate::text::grammar::GrammarError;
use crate::text::output::{Delta, Ending, Output, Scored};
use protocol::chat::FinishReason;
use protocol::usage::{CompletionTokensDetails, PromptTokensDetails, Timings, Usage};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

/// Everything the thread owns.
pub(super) struct Worker {
    config: EngineConfig,
    metrics: ModelMetrics,
    inbox: Receiver<Command>,
    scheduler: Scheduler,
    pace: Pace,
    runner: ModelRunner,
    lives: HashMap<SequenceId, Life>,
    mode: Mode,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Serving,
    Draining,
    Stopped,
}

/// What belongs to a request beside its tokens.
struct Life {
    request_id: String,
    sampler: Sampler,
    guide: Guide,
    /// Tokens that end the answer.
    ends: Vec<u32>,
    output: Output,
    sink: Sink,
    ticket: Ticket,
    prompt: u64,
    /// Tokens of the prompt that were computed before it came.
    cached: u64,
    max_tokens: u64,
    generated: u64,
    /// The score of each token of the prompt, where wanted and not given yet.
    prompt_scores: Option<Vec<Option<Scored>>>,
    /// The score of the token just chosen.
    scored: Option<Scored>,
    clock: Clock,
    deadline: Instant,
    /// Since when the reader has taken nothing.
    behind_since: Option<Instant>,
    /// How many tokens to guess ahead.
    drafter: Drafter,
    /// Why the token just chosen was the last.
    ended: Option<(FinishReason, Option<String>)>,
    /// Done, but the reader has not taken all of it yet.
    finish: Option<Finish>,
}

/// The tokens a sequence wrote in one step.
type Sampled = (SequenceId, Vec<u32>);

struct Clock {
    arrived: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl Worker {
    pub(super) fn new(
        model: Box<dyn CausalLm>,
        config: EngineConfig,
        metrics: ModelMetrics,
        inbox: Receiver<Command>,
        held: Arc<AtomicU64>,
    ) -> Self {
        Self {
            scheduler: Scheduler::new(config.bounds),
            pace: Pace::new(config.stretch),
            runner: ModelRunner::new(model, config.bounds, held, metrics.clone()),
            lives: HashMap::new(),
            mode: Mode::Serving,
            config,
            metrics,
            inbox,
        }
    }

    /// Runs until told to end. On a fault every request is told and the reason returned.
    pub(super) fn run(mut self) -> Result<(), String> {
        // A panic in a kernel is a fault like any other: it must not leave clients waiting.
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            while self.mode != Mode::Stopped {
                self.tick()?;
            }
            Ok::<(), ModelError>(())
        }));
        let outcome = match outcome {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(panic) => Err(format!("the engine's thread panicked: {}", words(&*panic))),
        };
        let error = match &outcome {
            Ok(()) => EngineError::Stopped,
            Err(reason) => EngineError::Fault(reason.clone()),
        };
        for id in self.lives.keys().copied().collect::<Vec<_>>() {
            self.fail(id, error.clone());
        }
        // Requests sent while the engine was ending are told too.
        for command in self.inbox.try_iter() {
            if let Command::Submit(_, _, sink, _) = command {
                self.metrics.failed(error.reason());
                sink.end(Err(error.clone()));
            }
        }
        self.metrics.running.set(0);
        outcome
    }

    fn tick(&mut self) -> Result<(), ModelError> {
        self.drain_inbox();
        self.expire(Instant::now());
        let plan = self.plan();
        if plan.is_empty() {
            self.wait();
            return Ok(());
        }
        let began = Instant::now();
        let sampled = if self.wants_tokens_alone(&plan) {
            let (rules, forced) = self.rules(&plan);
            let (runner, scheduler) = (&mut self.runner, &self.scheduler);
            let chosen = runner.run_chosen(&plan, scheduler, &rules, self.config.vocab)?;
            self.take_chosen(&plan, forced, &chosen)
        } else {
            let mut logits = self.runner.run(&plan, &self.scheduler)?;
            self.sample(&plan, &mut logits)
        };
        self.keep_rows(&plan, &sampled);
        let (decode, prefill) = plan.token_counts();
        let seconds = began.elapsed().as_secs_f64();
        self.metrics.step(decode, prefill, seconds);
        self.pace.learn(decode, prefill, seconds);
        self.scheduler.commit(&plan, &sampled);
        self.draft(&plan, &sampled)?;
        for row in plan.rows.iter().filter(|row| row.save) {
            if let Some(sequence) = self.scheduler.running(row.sequence) {
                self.runner.keep(sequence);
            }
        }
        self.emit(&sampled);
        Ok(())
    }

    fn drain_inbox(&mut self) {
        loop {
            match self.inbox.try_recv() {
                Ok(command) => self.obey(command),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    // No handle is left, so no request can come; those here hold a sender each.
                    self.mode = Mode::Stopped;
                    return;
                }
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(id, request, sink, ticket) => self.take(id, *request, sink, ticket),
            Command::Cancel(id) => self.cancel(id),
            Command::Abort(id) => self.abort(id),
            Command::Resume(id) => self.resume(id),
            Command::Bound(bounds, done) => {
                self.bound(bounds);
                drop(done);
            }
            Command::Drain => self.mode = Mode::Draining,
            Command::Stop => self.mode = Mode::Stopped,
        }
    }

    /// Changes the bounds and sees to it at once that all is within them: the next step may be long in coming, and somebody
    /// waits for the memory. What is only kept for later goes first: a sequence is set back where those that run do not
    /// fit by themselves.
    fn bound(&mut self, bounds: scheduler::Bounds) {
        self.config.bounds = bounds;
        self.scheduler.set_bounds(bounds);
        let preempted = self.scheduler.make_room(&self.runner);
        self.let_go(&preempted);
        self.runner.set_bounds(bounds);
        self.tell_running();
    }

    /// Frees what sequences hold that were set back.
    fn let_go(&mut self, preempted: &[SequenceId]) {
        for id in preempted {
            self.runner.forget(*id);
            self.metrics.preemptions.inc();
        }
    }

    fn tell_running(&self) {
        let running = self.scheduler.running_count();
        let running = i64::try_from(running).unwrap_or(i64::MAX);
        self.metrics.running.set(running);
    }

    fn take(&mut self, id: SequenceId, request: Request, sink: Sink, ticket: Ticket) {
        let life = Life {
            request_id: request.id,
            sampler: Sampler::new(request.sampling, &request.prompt),
            guide: request.guide,
            ends: request.ends,
            output: request.output,
            sink,
            ticket,
            prompt: request.prompt.len() as u64,
            cached: 0,
            max_tokens: request.max_tokens as u64,
            generated: 0,
            prompt_scores: request
                .score_prompt
                .then(|| vec![None; request.prompt.len()]),
            scored: None,
            clock: Clock {
                arrived: request.arrived,
                started: None,
                first_token: None,
                last_token: None,
            },
            deadline: request.deadline,
            behind_since: None,
            drafter: Drafter::default(),
            ended: None,
            finish: None,
        };
        self.lives.insert(id, life);
        self.scheduler.add(Sequence {
            priority: request.priority,
            user: request.user,
            every_logit: request.score_prompt,
            places: request.places,
            salt: request.salt,
            ..Sequence::new(id, request.prompt)
        });
    }

    fn plan(&mut self) -> Plan {
        let plan = self.scheduler.plan(&mut self.runner, self.pace.beside());
        self.let_go(&plan.preempted);
        let now = Instant::now();
        for id in &plan.started {
            let Some(life) = self.lives.get_mut(id) else {
                continue;
            };
            if life.clock.started.is_none() {
                life.clock.started = Some(now);
                let sequence = self.scheduler.running(*id);
                life.cached = sequence.map_or(0, |sequence| sequence.computed as u64);
                life.ticket.start();
                self.metrics
                    .queue
                    .observe((now - life.clock.arrived).as_secs_f64());
                self.metrics.prompt_tokens.inc_by(life.prompt);
            }
        }
        self.tell_running();
        plan
    }

    /// Whether of every row that samples the next token is wanted and nothing else of the logits. They then need not be brought
    /// to the host: the model chooses.
    fn wants_tokens_alone(&self, plan: &Plan) -> bool {
        self.config.bounds.drafts == 0
            && plan.rows.iter().all(|row| {
                let life = || self.lives.get(&row.sequence);
                !row.every && (!row.sample || life().is_some_and(Life::wants_tokens_alone))
            })
    }

    /// By which rule the next token of each row that samples is chosen, and the one that takes the place of a choice where there
    /// is one.
    fn rules(&mut self, plan: &Plan) -> (Vec<Rule>, Vec<Result<Option<u32>, EngineError>>) {
        let rows = plan.rows.iter().filter(|row| row.sample);
        let lives = rows.map(|row| {
            let life = self.lives.get_mut(&row.sequence);
            let rule = life.map(|life| life.rule(&self.metrics));
            match rule {
                Some(Ok((rule, forced))) => (rule, Ok(forced)),
                Some(Err(error)) => (Rule::likeliest(), Err(error)),
                None => (Rule::likeliest(), Ok(None)), // nobody waits for it
            }
        });
        lives.collect()
    }

    /// Takes in the token of every row that samples; a sequence whose logits are no numbers fails alone.
    fn take_chosen(
        &mut self,
        plan: &Plan,
        forced: Vec<Result<Option<u32>, EngineError>>,
        chosen: &[Option<u32>],
    ) -> Vec<Sampled> {
        let mut sampled = Vec::new();
        let rows = plan.rows.iter().filter(|row| row.sample);
        for (row, (forced, chosen)) in rows.zip(forced.into_iter().zip(chosen)) {
            let id = row.sequence;
            let Some(life) = self.lives.get_mut(&id) else {
                continue;
            };
            let written = forced.and_then(|forced| {
                let chosen = chosen.ok_or(NotANumber)?;
                let token = forced.unwrap_or(chosen);
                life.sampler.took(token);
                life.advance(token)?;
                Ok(token)
            });
            match written {
                Ok(token) => sampled.push((id, vec![token])),
                Err(error) => self.fail(id, error),
            }
        }
        sampled
    }

    /// The next token of every row that samples, with the drafts before it that held; a sequence whose logits are no
    /// numbers fails alone.
    fn sample(&mut self, plan: &Plan, logits: &mut Logits) -> Vec<Sampled> {
        let mut sampled = Vec::new();
        let length = logits.vocab();
        let allowed = self.config.vocab.min(length);
        for (row, logits) in plan.rows.iter().zip(logits.by_row()) {
            let id = row.sequence;
            let Some(life) = self.lives.get_mut(&id) else {
                continue;
            };
            if row.every
                && let Some(sequence) = self.scheduler.running(id)
            {
                let places = logits.chunks_exact(length).map(|logits| &logits[..allowed]);
                let places = row.tokens.clone().zip(places);
                if let Err(error) = life.score_prompt(&sequence.tokens, places) {
                    self.fail(id, error.into());
                    continue;
                }
            }
            if !row.sample {
                continue;
            }
            if let Some(scores) = life.prompt_scores.take() {
                life.sink.send(Delta::Prompt(scores));
            }
            if life.max_tokens == 0 {
                self.complete(id);
                continue;
            }
            let drafts = match self.scheduler.running(id) {
                Some(sequence) => &sequence.drafts[..row.drafts],
                None => &[],
            };
            let first = logits.len() - (1 + drafts.len()) * length;
            let places = logits[first..].chunks_exact_mut(length);
            match life.write(places, allowed, drafts, &self.metrics) {
                Ok(tokens) => sampled.push((id, tokens)),
                Err(error) => self.fail(id, error),
            }
        }
        sampled
    }

    /// Takes back what was computed of drafts that did not hold.
    fn keep_rows(&mut self, plan: &Plan, sampled: &[Sampled]) {
        for row in plan.rows.iter().filter(|row| row.drafts > 0) {
            let written = sampled.iter().find(|(id, _)| *id == row.sequence);
            let Some((id, tokens)) = written else {
                continue; // it failed
            };
            let accepted = tokens.len() - 1;
            self.runner.keep_rows(*id, 1 + accepted, row.count());
            self.metrics.drafted.inc_by(row.drafts as u64);
            self.metrics.accepted.inc_by(accepted as u64);
            if let Some(life) = self.lives.get_mut(id) {
                life.drafter.learn(row.drafts, accepted);
            }
        }
    }

    /// Guesses what comes next, where that is wanted.
    fn draft(&mut self, plan: &Plan, sampled: &[Sampled]) -> Result<(), ModelError> {
        if self.config.bounds.drafts == 0 {
            return Ok(());
        }
        let writers = sampled.len();
        let (mut drafting, mut start) = (Vec::new(), 0);
        for row in &plan.rows {
            let written = sampled.iter().find(|(id, _)| *id == row.sequence);
            let accepted = written.map_or(0, |(_, tokens)| tokens.len() - 1);
            let rows = start..start + row.tokens.len() + accepted;
            start += row.count();
            let (Some(sequence), Some(life)) = (
                self.scheduler.running(row.sequence),
                self.lives.get_mut(&row.sequence),
            ) else {
                continue;
            };
            let left = (life.max_tokens - life.generated).saturating_sub(1);
            let most = match (written, &life.finish) {
                (Some(_), None) if life.ended.is_none() && !sequence.every_logit => {
                    self.config.bounds.drafts as u64
                }
                _ => 0,
            };
            drafting.push(Drafting {
                sequence,
                rows,
                count: life.drafter.count(most.min(left) as usize, writers),
            });
        }
        let guesses = self.runner.draft(&drafting, self.config.vocab)?;
        let ids: Vec<_> = drafting.iter().map(|one| one.sequence.id).collect();
        for (id, drafts) in ids.into_iter().zip(guesses) {
            self.scheduler.set_drafts(id, drafts);
        }
        Ok(())
    }

    /// Counts what was written; ends what is done.
    fn emit(&mut self, sampled: &[Sampled]) {
        let now = Instant::now();
        for (id, tokens) in sampled {
            let Some(life) = self.lives.get_mut(id) else {
                continue;
            };
            self.metrics.generation_tokens.inc_by(tokens.len() as u64);
            match life.clock.last_token.replace(now) {
                Some(last) => {
                    let each = (now - last).as_secs_f64() / tokens.len() as f64;
                    for _ in tokens {
                        self.metrics.inter_token.observe(each);
                    }
                }
                None => {
                    life.clock.first_token = Some(now);
                    self.metrics
                        .first_token
                        .observe((now - life.clock.arrived).as_secs_f64());
                }
            }
            if let Some((reason, stop_string)) = life.ended.take() {
                life.finish = Some(life.finished(reason, stop_string));
                if let Some(sequence) = self.scheduler.remove(*id) {
                    self.runner.keep(&sequence);
                }
                self.runner.forget(*id);
            }
            self.settle(*id, now);
        }
    }

    /// Ends a request that wanted its prompt computed and no answer.
    fn complete(&mut self, id: SequenceId) {
        let Some(life) = self.lives.get_mut(&id) else {
            return;
        };
        let now = Instant::now();
        life.clock.first_token = Some(now);
        life.finish = Some(life.finished(FinishReason::Length, None));
        self.scheduler.remove(id);
        self.runner.forget(id);
        self.settle(id, now);
    }

    /// Pauses a sequence whose reader is behind, resumes it when that is over, ends it when it is done.
    fn settle(&mut self, id: SequenceId, now: Instant) {
        let Some(life) = self.lives.get_mut(&id) else {
            return;
        };
        if life.sink.is_behind() {
            life.behind_since.get_or_insert(now);
            self.scheduler.pause(id);
            return;
        }
        life.behind_since = None;
        self.scheduler.resume(id);
        if let Some(finish) = life.finish.take() {
            self.finish(id, finish);
        }
    }

    fn resume(&mut self, id: SequenceId) {
        let Some(life) = self.lives.get_mut(&id) else {
            return;
        };
        let now = Instant::now();
        if !life.sink.flush() {
            // It took something: the clock begins anew.
            life.behind_since = Some(now);
        }
        self.settle(id, now);
    }

    fn finish(&mut self, id: SequenceId, finish: Finish) {
        let Some(life) = self.release(id) else { return };
        let reason = finish.reason.as_str();
        self.metrics.success(reason);
        self.metrics
            .whole
            .observe(life.clock.arrived.elapsed().as_secs_f64());
        self.metrics.answered(&finish);
        tracing::info!(
            request = life.request_id,
            model = self.config.id,
            finish = reason,
            prompt_tokens = life.prompt,
            cached_tokens = life.cached,
            completion_tokens = life.generated,
            queue_ms = finish.timings.queue_ms,
            prefill_ms = finish.timings.prefill_ms,
            decode_ms = finish.timings.decode_ms,
            "answered"
        );
        // Not in flight any more when the reader learns of the end.
        drop(life.ticket);
        life.sink.end(Ok(finish));
    }

    fn fail(&mut self, id: SequenceId, error: EngineError) {
        let Some(mut life) = self.release(id) else {
            return;
        };
        self.metrics.failed(error.reason());
        tracing::warn!(
            request = life.request_id,
            model = self.config.id,
            completion_tokens = life.generated,
            %error,
            "request failed"
        );
        life.sink.flush();
        drop(life.ticket);
        life.sink.end(Err(error));
    }

    fn cancel(&mut self, id: SequenceId) {
        let Some(life) = self.release(id) else { return };
        self.metrics.cancelled(life.phase());
        tracing::info!(
            request = life.request_id,
            model = self.config.id,
            phase = life.phase(),
            completion_tokens = life.generated,
            "client left"
        );
    }

    fn abort(&mut self, id: SequenceId) {
        if let Some(life) = self.lives.get(&id) {
            self.metrics.cancelled(life.phase());
            self.fail(id, EngineError::Cancelled);
        }
    }

    /// Frees everything a request holds but its reader.
    fn release(&mut self, id: SequenceId) -> Option<Life> {
        self.scheduler.remove(id);
        self.runner.forget(id);
        self.lives.remove(&id)
    }

    /// Fails what is past its deadline, cuts readers that take nothing.
    fn expire(&mut self, now: Instant) {
        let stall_limit = self.config.stall_limit;
        let expired: Vec<_> = self
            .lives
            .iter()
            .filter_map(|(id, life)| {
                if now >= life.deadline {
                    return Some((*id, EngineError::Deadline));
                }
                let since = life.behind_since?;
                (now - since >= stall_limit).then_some((*id, EngineError::SlowReader))
            })
            .collect();
        for (id, error) in expired {
            self.fail(id, error);
        }
    }

    /// Nothing to compute: sleeps until told something or until something expires.
    fn wait(&mut self) {
        if self.mode == Mode::Draining && self.lives.is_empty() {
            self.mode = Mode::Stopped;
        }
        if self.mode == Mode::Stopped {
            return;
        }
        let next_expiry = self
            .lives
            .values()
            .flat_map(|life| {
                let stalled = life
                    .behind_since
                    .map(|since| since + self.config.stall_limit);
                [Some(life.deadline), stalled]
            })
            .flatten()
            .min();
        let received = match next_expiry {
            Some(expiry) => {
                let left = expiry.saturating_duration_since(Instant::now());
                self.inbox.recv_timeout(left)
            }
            None => self
                .inbox
                .recv()
                .map_err(|_| RecvTimeoutError::Disconnected),
        };
        match received {
            Ok(command) => self.obey(command),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => self.mode = Mode::Stopped,
        }
    }
}

impl Life {
    /// What it is doing, for metrics.
    fn phase(&self) -> &'static str {
        match (self.clock.started, self.clock.first_token) {
            (None, _) => "waiting",
            (Some(_), None) => "prefill",
            (Some(_), Some(_)) => "decode",
        }
    }

    /// Whether there is a next token, and nothing else is wanted of the logits.
    fn wants_tokens_alone(&self) -> bool {
        !self.sampler.scores() && self.prompt_scores.is_none() && self.max_tokens > 0
    }

    /// The score of each prompt token that follows one of `places`, each of which comes with its logits.
    fn score_prompt<'a>(
        &mut self,
        tokens: &[u32],
        places: impl Iterator<Item = (usize, &'a [f32])>,
    ) -> Result<(), NotANumber> {
        let Some(scores) = &mut self.prompt_scores else {
            return Ok(());
        };
        for (at, logits) in places {
            if let Some(place) = scores.get_mut(at + 1) {
                let top = self.sampler.top_count();
                *place = Some(score(logits, tokens[at + 1], top)?);
            }
        }
        Ok(())
    }

    /// What the guide says of the next token.
    fn guided(&mut self, metrics: &ModelMetrics) -> Result<Next, GrammarError> {
        let began = Instant::now();
        let next = self.guide.next(&self.output)?;
        if next.mask.is_some() {
            metrics.mask.observe(began.elapsed().as_secs_f64());
        }
        Ok(next)
    }

    /// By which rule the next token is chosen, and the one that takes the place of a choice.
    fn rule(&mut self, metrics: &ModelMetrics) -> Result<(Rule, Option<u32>), EngineError> {
        let next = self.guided(metrics)?;
        let rule = match next.forced {
            Some(_) => Rule::likeliest(), // only whether the logits are numbers
            None => self.sampler.rule(next.mask, &self.ends),
        };
        Ok((rule, next.forced))
    }

    /// The next token, from logits.
    fn choose(&mut self, logits: &mut [f32], metrics: &ModelMetrics) -> Result<u32, EngineError> {
        let next = self.guided(metrics)?;
        let bounds = Bounds {
            forced: next.forced,
            mask: next.mask,
            ends: &self.ends,
        };
        let choice = self.sampler.next(logits, bounds)?;
        self.scored = choice.scored;
        Ok(choice.token)
    }

    /// Writes on as long as the tokens that are chosen are those that were guessed, and one further. What is chosen does
    /// not depend on the guesses: each token is drawn from what the model says of its place.
    fn write<'a>(
        &mut self,
        places: impl Iterator<Item = &'a mut [f32]>,
        allowed: usize,
        drafts: &[u32],
        metrics: &ModelMetrics,
    ) -> Result<Vec<u32>, EngineError> {
        let mut tokens = Vec::new();
        for logits in places {
            let token = self.choose(&mut logits[..allowed], metrics)?;
            let guessed = drafts.get(tokens.len()) == Some(&token);
            tokens.push(token);
            self.advance(token)?;
            if self.ended.is_some() || !guessed {
                break;
            }
        }
        Ok(tokens)
    }

    /// Takes a sampled token in: its text goes to the reader.
    fn advance(&mut self, token: u32) -> Result<(), GrammarError> {
        self.generated += 1;
        let mut deltas = Vec::new();
        deltas.extend(self.scored.take().map(Delta::Scored));
        self.ended = self.ending(token, &mut deltas)?;
        for delta in deltas {
            self.sink.send(delta);
        }
        Ok(())
    }

    fn ending(
        &mut self,
        token: u32,
        deltas: &mut Vec<Delta>,
    ) -> Result<Option<(FinishReason, Option<String>)>, GrammarError> {
        let reason = if self.ends.contains(&token) {
            FinishReason::Stop
        } else {
            match self.output.push(token, deltas) {
                Some(Ending::StopString(stop)) => {
                    return Ok(Some((FinishReason::Stop, Some(stop))));
                }
                Some(Ending::OneCall) => return Ok(Some((FinishReason::Stop, None))),
                None => {}
            }
            if self.guide.accept(token, &self.output)? {
                FinishReason::Stop
            } else if self.generated >= self.max_tokens {
                FinishReason::Length
            } else {
                return Ok(None);
            }
        };
        self.output.finish(deltas);
        Ok(Some((reason, None)))
    }

    fn finished(&self, reason: FinishReason, stop_string: Option<String>) -> Finish {
        let called = reason == FinishReason::Stop && self.output.calls() > 0;
        Finish {
            reason: if called {
                FinishReason::ToolCalls
            } else {
                reason
            },
            stop_string,
            usage: Usage {
                prompt_tokens_details: Some(PromptTokensDetails {
                    cached_tokens: self.cached,
                }),
                completion_tokens_details: Some(CompletionTokensDetails {
                    reasoning_tokens: self.output.reasoning_tokens(),
                    accepted_prediction_tokens: self.drafter.accepted(),
                    rejected_prediction_tokens: self.drafter.rejected(),
                }),
                ..Usage::new(self.prompt, self.generated)
            },
            timings: self.clock.timings(),
        }
    }
}

impl Clock {
    fn timings(&self) -> Timings {
        let between = |from: Option<Instant>, to: Option<Instant>| {
            let (from, to) = from.zip(to).unwrap_or((self.arrived, self.arrived));
            let span: Duration = to.saturating_duration_since(from);
            (span.as_secs_f64() * 1e6).round() / 1e3
        };
        Timings {
            queue_ms: between(Some(self.arrived), self.started),
            prefill_ms: between(self.started, self.first_token),
            decode_ms: between(self.first_token, self.last_token),
        }
    }
}

/// What a panic said.
pub(crate) fn words(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
