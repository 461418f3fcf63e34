//! The world around the three machines, for the model checker: a network, locks, a pipe, killed processes, a person.
//!
//! The world decides nothing about the hand-over: it delivers events to the real [`Source`], [`Target`] and [`Keeper`] and performs
//! their actions on a handful of facts. It is as hostile as the ground can be:
//! - the network is the set of everything that was ever said: each message may arrive at any later time, any number of times, in any
//!   order, or never; words about an earlier move of the same machine float around from the start;
//! - between any two actions a process may be killed; connections get lost, time-outs fire, steps fail, someone cancels, all at any time;
//! - locks may be refused although they are free; the receiver may be killed and comes back knowing nothing;
//! - a person may act whenever the source is in doubt, and asserts only what is true.

use super::tests::{earlier_move, this_move};
use super::*;
use std::collections::{BTreeSet, VecDeque};

/// A rule taken out, to see what the checker finds then. The product's code has no such switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// A lost connection right after Go is taken for "Go was not sent".
    GoCountsOnlyIfDelivered,
    /// The target runs without having taken the locks.
    TargetStartsUnlocked,
    /// The source goes on without having taken the locks.
    SourceResumesUnlocked,
    /// The keeper answers `Discarded` for a process that had said "starting".
    KeeperForgetsStarting,
    /// The target says "starting" only after the first instruction.
    StartingSaidTooLate,
    /// A target that has discarded can still be told to go.
    DiscardIsNotForEver,
    /// A source in doubt takes a time-out for an answer.
    TimeOutIsAnAnswer,
    /// `resolve --here` on the ground that the guest does not run at the target right now.
    PersonSaysNotRunningNow,
    /// The target's side says anything at any time, true or not.
    AnswersAreTrue,
}

/// The rules that are taken out.
pub(super) type Out = &'static [Broken];

/// What is said over the network.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Said {
    /// The last pages and the state.
    State,
    Order(Order),
    Answer(Answer),
}

/// A guest's copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Copy {
    Running,
    Standing,
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Side {
    Source,
    Target,
}

/// A living process: the machine under test, what it is doing, and what it will be told of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Process<M, A, E> {
    pub(super) machine: M,
    pub(super) todo: VecDeque<A>,
    pub(super) result: Option<E>,
}

impl<M, A, E> Process<M, A, E> {
    fn new(machine: M, result: Option<E>) -> Self {
        Self { machine, todo: VecDeque::new(), result }
    }

    fn will_be_told(&mut self, result: E) {
        assert!(self.result.is_none() && self.todo.is_empty(), "an action that has a result is not the last");
        self.result = Some(result);
    }
}

/// Everything there is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    /// `None` once killed, here and below.
    pub(super) source: Option<Process<Source, SourceAction, SourceEvent>>,
    pub(super) target: Option<Process<Target, TargetAction, TargetEvent>>,
    pub(super) keeper: Option<Keeper>,
    /// From the target's process to the keeper, in order.
    pub(super) pipe: VecDeque<KeeperEvent>,
    pub(super) source_copy: Copy,
    pub(super) target_copy: Copy,
    /// Who holds the disk locks.
    pub(super) locks: Option<Side>,
    pub(super) said: BTreeSet<Said>,
    /// The guest has executed at the target.
    pub(super) ran_there: bool,
    /// The source has kept the guest for good.
    pub(super) stays_here: bool,
    /// A person said `--here`, `--there`.
    pub(super) word_here: bool,
    pub(super) word_there: bool,
    /// A process that had a copy was killed.
    pub(super) killed: bool,
    /// What went wrong at a single step and cannot be seen in the facts afterwards.
    pub(super) wrong: Option<&'static str>,
}

pub(super) const WENT_BACK: &str = "a copy went on that the guest had left behind";
pub(super) const DESTROYED: &str = "a copy was destroyed that was the only one";

/// One thing that happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The next action, which takes locks only if the flag allows it.
    SourceActs {
        locks: bool,
    },
    TargetActs {
        locks: bool,
    },
    Source(SourceEvent),
    Target(TargetEvent),
    /// An order reaches the receiver.
    AskKeeper(Move, Order),
    KeeperReads,
    /// The target's process ends after it has discarded.
    TargetExits,
    KillSource,
    KillTarget,
    KillKeeper,
}

impl World {
    pub(super) fn new() -> Self {
        Self {
            source: Some(Process::new(Source::new(this_move()), None)),
            target: Some(Process::new(Target::new(this_move()), Some(TargetEvent::Built))),
            keeper: Some(Keeper::new(this_move())),
            pipe: VecDeque::new(),
            source_copy: Copy::Running,
            target_copy: Copy::Gone,
            locks: Some(Side::Source),
            said: BTreeSet::new(),
            ran_there: false,
            stays_here: false,
            word_here: false,
            word_there: false,
            killed: false,
            wrong: None,
        }
    }

    pub(super) fn source_state(&self) -> Option<SourceState> {
        self.source.as_ref().map(|process| process.machine.state())
    }

    pub(super) fn target_state(&self) -> Option<TargetState> {
        self.target.as_ref().map(|process| process.machine.state())
    }

    /// Nothing can make the target start any more. (What a person must know before `resolve --here`.)
    fn cannot_start_there(&self) -> bool {
        self.target_copy != Copy::Running && matches!(self.target_state(), None | Some(TargetState::Discarded))
    }

    /// Everything that may happen next.
    pub(super) fn steps(&self, out: Out, steps: &mut Vec<Step>) {
        if let Some(source) = &self.source {
            steps.push(Step::KillSource);
            match source.todo.front() {
                Some(action) => {
                    steps.push(Step::SourceActs { locks: true });
                    steps.extend((*action == SourceAction::TakeLocks).then_some(Step::SourceActs { locks: false }));
                }
                None => self.source_events(source, out, steps),
            }
        }
        if let Some(target) = &self.target {
            steps.push(Step::KillTarget);
            match target.todo.front() {
                Some(action) => {
                    steps.push(Step::TargetActs { locks: true });
                    steps.extend((*action == TargetAction::TakeLocks).then_some(Step::TargetActs { locks: false }));
                }
                None => self.target_events(target, steps),
            }
        }
        for order in self.orders() {
            steps.push(Step::AskKeeper(this_move(), order));
        }
        steps.push(Step::AskKeeper(earlier_move(), Order::Ask));
        steps.extend((!self.pipe.is_empty()).then_some(Step::KeeperReads));
        steps.extend(self.keeper.is_some().then_some(Step::KillKeeper));
    }

    fn orders(&self) -> impl Iterator<Item = Order> {
        self.said.iter().filter_map(|said| if let Said::Order(order) = said { Some(*order) } else { None })
    }

    fn source_events(&self, source: &Process<Source, SourceAction, SourceEvent>, out: Out, steps: &mut Vec<Step>) {
        use SourceEvent as E;
        let answers = self.said.iter().filter_map(|said| match said {
            Said::Answer(answer) => Some(E::Answer(this_move(), answer.clone())),
            _ => None,
        });
        let stray = [Answer::Loaded, Answer::Running, Answer::Discarded, Answer::Pending, Answer::Ended];
        let stray = stray.map(|answer| E::Answer(earlier_move(), answer));
        let lies =
            [Answer::Running, Answer::Discarded, Answer::Pending, Answer::Ended, Answer::Unknown, Answer::Loaded];
        let lies = lies.map(|answer| E::Answer(this_move(), answer));
        let lies = lies.into_iter().filter(|_| out.contains(&Broken::AnswersAreTrue));
        let any_time = [E::Converged, E::Lost, E::TimedOut, E::Failed, E::Cancel];
        let mut events: Vec<E> =
            source.result.iter().cloned().chain(any_time).chain(stray).chain(answers).chain(lies).collect();
        let in_doubt = matches!(source.machine.state(), SourceState::InDoubt | SourceState::LostThere);
        let weak = out.contains(&Broken::PersonSaysNotRunningNow) && self.target_copy != Copy::Running;
        events.extend((in_doubt && (self.cannot_start_there() || weak)).then_some(E::ResolveHere));
        events.extend((in_doubt && self.ran_there).then_some(E::ResolveThere));
        steps.extend(events.into_iter().map(Step::Source));
    }

    fn target_events(&self, target: &Process<Target, TargetAction, TargetEvent>, steps: &mut Vec<Step>) {
        use TargetEvent as E;
        let stray = [Order::Go, Order::Cancel, Order::Ask].map(|order| E::Order(earlier_move(), order));
        let any_time = [E::Lost, E::TimedOut, E::Failed(String::new())];
        steps.extend(target.result.iter().cloned().chain(any_time).chain(stray).map(Step::Target));
        steps.extend(self.orders().map(|order| Step::Target(E::Order(this_move(), order))));
        steps.extend(self.said.contains(&Said::State).then_some(Step::Target(E::StateArrived)));
        steps.extend((target.machine.state() == TargetState::Discarded).then_some(Step::TargetExits));
    }

    /// What is said by the way, in order.
    pub(super) fn take(&mut self, step: Step, out: Out) -> Vec<Said> {
        let mut news = vec![];
        match step {
            Step::SourceActs { locks } => self.source_acts(locks, out, &mut news),
            Step::TargetActs { locks } => self.target_acts(locks, out, &mut news),
            Step::Source(event) => self.source_hears(event, out),
            Step::Target(event) => self.target_hears(event, out),
            Step::AskKeeper(of, order) => self.ask_keeper(of, order, out, &mut news),
            Step::KeeperReads => {
                let event = self.pipe.pop_front();
                let forgets = out.contains(&Broken::KeeperForgetsStarting) && event == Some(KeeperEvent::Starting);
                if let (Some(keeper), Some(event), false) = (&mut self.keeper, event, forgets) {
                    assert_eq!(keeper.on(event), Ok(None));
                }
            }
            Step::KillSource => {
                self.killed |= self.source_copy != Copy::Gone;
                (self.source, self.source_copy) = (None, Copy::Gone);
                self.locks.take_if(|holder| *holder == Side::Source);
            }
            Step::KillTarget | Step::TargetExits => {
                self.killed |= step == Step::KillTarget;
                (self.target, self.target_copy) = (None, Copy::Gone);
                self.locks.take_if(|holder| *holder == Side::Target);
                self.pipe.extend(self.keeper.is_some().then_some(KeeperEvent::Ended));
            }
            Step::KillKeeper => {
                self.keeper = None;
                self.pipe.clear();
            }
        }
        self.said.extend(news.iter().cloned());
        news
    }

    fn source_hears(&mut self, event: SourceEvent, out: Out) {
        use SourceState::{Committing, InDoubt, Loading};
        let Some(source) = &mut self.source else { return };
        source.result.take_if(|result| *result == event);
        let mut heard = event.clone();
        match (source.machine.state(), &event) {
            (Committing, SourceEvent::Lost) if out.contains(&Broken::GoCountsOnlyIfDelivered) => {
                source.machine = Source::at(this_move(), Loading);
            }
            (InDoubt, SourceEvent::TimedOut) if out.contains(&Broken::TimeOutIsAnAnswer) => {
                heard = SourceEvent::Answer(this_move(), Answer::Discarded);
            }
            _ => {}
        }
        if let Ok(actions) = source.machine.on(heard) {
            source.todo = actions.into();
            self.word_here |= event == SourceEvent::ResolveHere;
            self.word_there |= event == SourceEvent::ResolveThere;
            self.stays_here |= source.machine.state() == SourceState::Here;
        }
    }

    fn target_hears(&mut self, event: TargetEvent, out: Out) {
        let Some(target) = &mut self.target else { return };
        target.result.take_if(|result| *result == event);
        let late_go =
            event == TargetEvent::Order(this_move(), Order::Go) && target.machine.state() == TargetState::Discarded;
        if out.contains(&Broken::DiscardIsNotForEver) && late_go {
            target.machine = Target::at(this_move(), TargetState::Loaded);
        }
        if let Ok(actions) = target.machine.on(event) {
            target.todo = actions.into();
            if out.contains(&Broken::StartingSaidTooLate) && target.todo.front() == Some(&TargetAction::TellKeeper) {
                target.todo.swap(0, 1);
            }
        }
    }

    fn ask_keeper(&mut self, of: Move, order: Order, out: Out, news: &mut Vec<Said>) {
        let action = match &mut self.keeper {
            Some(keeper) => keeper.on(KeeperEvent::Order(of, order)),
            None => Ok(Some(KeeperAction::Send(Answer::Unknown))),
        };
        match action {
            Ok(Some(KeeperAction::Send(answer))) => news.push(Said::Answer(answer)),
            Ok(Some(KeeperAction::PassOn(order)))
                if self.target.as_ref().is_some_and(|target| target.todo.is_empty()) =>
            {
                self.target_hears(TargetEvent::Order(of, order), out);
            }
            _ => {}
        }
    }

    fn source_acts(&mut self, locks: bool, out: Out, news: &mut Vec<Said>) {
        let Some(source) = &mut self.source else { return };
        let Some(action) = source.todo.pop_front() else { return };
        match action {
            SourceAction::WriteRecord => source.will_be_told(SourceEvent::Recorded),
            SourceAction::Stop => {
                self.source_copy = Copy::Standing;
                news.push(Said::State);
                source.will_be_told(SourceEvent::Sent);
            }
            SourceAction::ReleaseLocks => {
                self.locks.take_if(|holder| *holder == Side::Source);
            }
            SourceAction::Send(order) => news.push(Said::Order(order)),
            SourceAction::Ask => news.push(Said::Order(Order::Ask)),
            SourceAction::TakeLocks => {
                let careless = out.contains(&Broken::SourceResumesUnlocked);
                let taken = locks && self.locks.is_none();
                if taken {
                    self.locks = Some(Side::Source);
                }
                let told = if taken || careless { SourceEvent::LocksTaken } else { SourceEvent::LocksRefused };
                source.will_be_told(told);
            }
            SourceAction::Resume => {
                if self.ran_there && !self.word_here {
                    self.wrong = Some(WENT_BACK);
                }
                self.source_copy = Copy::Running;
            }
            SourceAction::Destroy => {
                if !self.ran_there && !self.word_there {
                    self.wrong = Some(DESTROYED);
                }
                self.source_copy = Copy::Gone;
            }
            SourceAction::RemoveRecord | SourceAction::RecordMoved => {}
        }
    }

    fn target_acts(&mut self, locks: bool, out: Out, news: &mut Vec<Said>) {
        let Some(target) = &mut self.target else { return };
        let Some(action) = target.todo.pop_front() else { return };
        match action {
            TargetAction::Send(answer) => news.push(Said::Answer(answer)),
            TargetAction::Load => target.will_be_told(TargetEvent::StateLoaded),
            TargetAction::TakeLocks => {
                let careless = out.contains(&Broken::TargetStartsUnlocked);
                let taken = locks && self.locks.is_none();
                if taken {
                    self.locks = Some(Side::Target);
                }
                let refused = TargetEvent::LocksRefused(String::new());
                target.will_be_told(if taken || careless { TargetEvent::LocksTaken } else { refused });
            }
            TargetAction::TellKeeper => self.pipe.extend(self.keeper.is_some().then_some(KeeperEvent::Starting)),
            TargetAction::Start => {
                if self.stays_here {
                    self.wrong = Some(WENT_BACK);
                }
                (self.target_copy, self.ran_there) = (Copy::Running, true);
            }
            TargetAction::Discard => {
                if self.ran_there {
                    self.wrong = Some(DESTROYED);
                }
            }
            TargetAction::ArmWait | TargetAction::Announce | TargetAction::WriteRecord => {}
        }
    }

    /// What comes of this world if nothing bad happens any more: what is said from now on arrives once and in order, steps succeed,
    /// and a time-out fires only when there is nothing else to wait for. What was said before counts as lost.
    pub(super) fn settle(mut self) -> Self {
        const STEPS: usize = 100;
        let mut on_the_way = VecDeque::new();
        for _ in 0..STEPS {
            let Some(step) = self.next_quiet_step(&mut on_the_way) else { break };
            on_the_way.extend(self.take(step, &[]));
        }
        self
    }

    /// Asking does not help any more.
    pub(super) fn waits_for_a_person(&self, state: SourceState) -> bool {
        state == SourceState::LostThere || (state == SourceState::InDoubt && self.keeper.is_none())
    }

    fn next_quiet_step(&mut self, on_the_way: &mut VecDeque<Said>) -> Option<Step> {
        let source = self.source.as_ref();
        let target = self.target.as_ref();
        if source.is_some_and(|source| !source.todo.is_empty()) {
            return Some(Step::SourceActs { locks: true });
        }
        if target.is_some_and(|target| !target.todo.is_empty()) {
            return Some(Step::TargetActs { locks: true });
        }
        if let Some(result) = source.and_then(|source| source.result.clone()) {
            return Some(Step::Source(result));
        }
        if let Some(result) = target.and_then(|target| target.result.clone()) {
            return Some(Step::Target(result));
        }
        if !self.pipe.is_empty() {
            return Some(Step::KeeperReads);
        }
        match on_the_way.pop_front() {
            Some(Said::State) => return Some(Step::Target(TargetEvent::StateArrived)),
            Some(Said::Order(Order::Ask)) => return Some(Step::AskKeeper(this_move(), Order::Ask)),
            Some(Said::Order(order)) => return Some(Step::Target(TargetEvent::Order(this_move(), order))),
            Some(Said::Answer(answer)) => return Some(Step::Source(SourceEvent::Answer(this_move(), answer))),
            None => {}
        }
        match (self.source_state(), self.target_state()) {
            (Some(SourceState::Copying), Some(TargetState::Ready)) => Some(Step::Source(SourceEvent::Converged)),
            (Some(state), _) if !self.waits_for_a_person(state) && !state.is_end() => {
                Some(Step::Source(SourceEvent::TimedOut))
            }
            (_, Some(state)) if !matches!(state, TargetState::Running | TargetState::Discarded) => {
                Some(Step::Target(TargetEvent::TimedOut))
            }
            _ => None,
        }
    }
}
