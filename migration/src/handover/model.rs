//! The world around the three machines, for the model checker: a network, locks, a pipe, killed processes, a record, a person.
//!
//! The world decides nothing about the hand-over: it delivers events to the real [`Source`], [`Target`] and [`Keeper`] and performs
//! their actions on a handful of facts. It is as hostile as the ground can be:
//! - the network is the set of everything that was ever said: each message may arrive at any later time, any number of times, in any
//!   order, or never; words about an earlier move of the same machine float around from the start;
//! - between any two actions a process may be killed; connections get lost, time-outs fire, steps fail, someone cancels, all at any time;
//! - locks may be refused although they are free, or there are none; the receiver may be killed and comes back knowing nothing;
//! - a machine whose process has ended may be started again, as far as its record allows (`restart.rs`);
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
    /// The guest is stopped and given away before the record is on disk.
    RecordComesBeforeGo,
    /// A machine is started whatever its record says.
    StartHeedsTheRecord,
    /// A guest that has moved leaves no record.
    MovedIsRecorded,
    /// A receiver that was started again takes a move that it does not know for one that it has discarded.
    UnknownIsNoAnswer,
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

/// What the guest's disks are on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Disks {
    /// Files, whose locks hold between hosts.
    Locked,
    /// A raw LUN, which anybody may write to.
    Lun,
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
    /// Of the guest on each host: that of a process of the move, or one that was started afterwards.
    pub(super) source_copy: Copy,
    pub(super) target_copy: Copy,
    pub(super) disks: Disks,
    /// Who holds the disk locks, where there are any.
    pub(super) locks: Option<Side>,
    /// The source's, on disk.
    pub(super) record: Option<Phase>,
    /// The target has recorded, on disk, that the guest arrived.
    pub(super) arrived: bool,
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
    /// The next action, and whether it works where it may fail.
    SourceActs {
        works: bool,
    },
    TargetActs {
        works: bool,
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
    /// The machine, which has no process there, is started from its disks.
    Restart(Side),
    /// A guest that was started so has ended.
    End(Side),
    /// A person settles the record of a source without a process.
    Settle(Resolution),
}

/// A person's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resolution {
    Here,
    There,
}

impl World {
    pub(super) fn new(disks: Disks) -> Self {
        Self {
            source: Some(Process::new(Source::new(this_move()), None)),
            target: Some(Process::new(Target::new(this_move()), Some(TargetEvent::Built))),
            keeper: Some(Keeper::new(this_move())),
            pipe: VecDeque::new(),
            source_copy: Copy::Running,
            target_copy: Copy::Gone,
            disks,
            locks: (disks == Disks::Locked).then_some(Side::Source),
            record: None,
            arrived: false,
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
    pub(super) fn cannot_start_there(&self) -> bool {
        self.target_copy != Copy::Running && matches!(self.target_state(), None | Some(TargetState::Discarded))
    }

    /// Everything that may happen next.
    pub(super) fn steps(&self, out: Out, steps: &mut Vec<Step>) {
        if let Some(source) = &self.source {
            steps.push(Step::KillSource);
            match source.todo.front() {
                Some(action) => {
                    use SourceAction::{RecordMoved, RemoveRecord, TakeLocks};
                    steps.push(Step::SourceActs { works: true });
                    let may_fail = matches!(action, TakeLocks | RemoveRecord | RecordMoved);
                    steps.extend(may_fail.then_some(Step::SourceActs { works: false }));
                }
                None => self.source_events(source, out, steps),
            }
        }
        if let Some(target) = &self.target {
            steps.push(Step::KillTarget);
            match target.todo.front() {
                Some(action) => {
                    use TargetAction::{TakeLocks, WriteRecord};
                    steps.push(Step::TargetActs { works: true });
                    let may_fail = matches!(action, TakeLocks | WriteRecord);
                    steps.extend(may_fail.then_some(Step::TargetActs { works: false }));
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
        self.restarts(out, steps);
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
            Step::SourceActs { works } => self.source_acts(works, out, &mut news),
            Step::TargetActs { works } => self.target_acts(works, out, &mut news),
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
            Step::Restart(side) => self.restart(side),
            Step::End(side) => self.end(side),
            Step::Settle(word) => self.settle_record(word),
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
            None if out.contains(&Broken::UnknownIsNoAnswer) => Ok(Some(KeeperAction::Send(Answer::Discarded))),
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

    fn source_acts(&mut self, works: bool, out: Out, news: &mut Vec<Said>) {
        let Some(action) = self.source.as_mut().and_then(|source| source.todo.pop_front()) else { return };
        let taken = action == SourceAction::TakeLocks && works && self.lock(Side::Source);
        let Some(source) = &mut self.source else { return };
        match action {
            SourceAction::WriteRecord => {
                self.record = (!out.contains(&Broken::RecordComesBeforeGo)).then_some(Phase::OnItsWay);
                source.will_be_told(SourceEvent::Recorded);
            }
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
            SourceAction::RemoveRecord | SourceAction::RecordMoved if !works => {}
            SourceAction::RemoveRecord => self.record = None,
            SourceAction::RecordMoved => {
                self.record = (!out.contains(&Broken::MovedIsRecorded)).then_some(Phase::Moved);
            }
        }
    }

    fn target_acts(&mut self, works: bool, out: Out, news: &mut Vec<Said>) {
        let Some(action) = self.target.as_mut().and_then(|target| target.todo.pop_front()) else { return };
        let taken = action == TargetAction::TakeLocks && works && self.lock(Side::Target);
        let Some(target) = &mut self.target else { return };
        match action {
            TargetAction::Send(answer) => news.push(Said::Answer(answer)),
            TargetAction::Load => target.will_be_told(TargetEvent::StateLoaded),
            TargetAction::TakeLocks => {
                let careless = out.contains(&Broken::TargetStartsUnlocked);
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
            TargetAction::WriteRecord => self.arrived |= works,
            TargetAction::ArmWait | TargetAction::Announce => {}
        }
    }
}
