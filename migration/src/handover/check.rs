//! The invariants of the hand-over, checked in every state that can be reached, and what the checker says when a rule is taken out.

use super::model::{Broken, Copy, DESTROYED, Disks, Out, Said, Side, Step, WENT_BACK, World};
use super::{Order, Phase, SourceAction, SourceState, TargetState};
use stateright::{Checker, HasDiscoveries, Model, Property};
use std::collections::{BTreeSet, HashSet};

/// How many different states can be reached: fewer, and the checker looks at less than it did.
const STATES: usize = 30760;

/// The world as a model, with all rules or without some.
struct Handover {
    out: Out,
    disks: &'static [Disks],
}

const ALL: &[Disks] = &[Disks::Locked, Disks::Lun];
/// The rules by themselves, without the locks behind them.
const LUN: &[Disks] = &[Disks::Lun];
const LOCKS: &[Disks] = &[Disks::Locked];

const NEVER_TWO: &str = "I1: never two copies that run";
const NEVER_BACK: &str = "I2: no copy goes on that the guest has left behind";
const NEVER_DESTROYED: &str = "I3: no copy is destroyed unless the guest runs or ran elsewhere";
const NEVER_NONE: &str = "I3: while no process is killed, there is a copy";
const NAMED: &str = "I3: a guest that stands still is in a state that says so";
const LOCKED: &str = "I4: who runs holds the locks";
const SETTLES: &str = "I5: without further faults the move ends, or waits for a person";
const RECORDED: &str = "I6: while the guest may start or runs at the target, the source's host has it on record";

impl Model for Handover {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        self.disks.iter().map(|disks| World::new(*disks)).collect()
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        world.steps(self.out, steps);
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        next.take(step, self.out);
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(NEVER_TWO, |_, world: &World| {
                !(world.source_copy == Copy::Running && world.target_copy == Copy::Running)
            }),
            Property::always(NEVER_BACK, |_, world: &World| world.wrong != Some(WENT_BACK)),
            Property::always(NEVER_DESTROYED, |_, world: &World| world.wrong != Some(DESTROYED)),
            Property::always(NEVER_NONE, |_, world: &World| {
                world.killed || world.source_copy != Copy::Gone || world.target_copy == Copy::Running
            }),
            Property::always(NAMED, |_, world: &World| world.source_copy != Copy::Standing || stands_by_name(world)),
            Property::always(LOCKED, |_, world: &World| {
                let held = |copy, side| copy != Copy::Running || world.locks == Some(side);
                world.disks == Disks::Lun
                    || held(world.source_copy, Side::Source) && held(world.target_copy, Side::Target)
            }),
            Property::always(RECORDED, |_, world: &World| {
                let may_start = world.said.contains(&Said::Order(Order::Go))
                    && matches!(
                        world.target_state(),
                        Some(TargetState::Loaded | TargetState::Locking | TargetState::Running)
                    );
                !may_start || world.record.is_some()
            }),
        ];
        if self.out.is_empty() {
            properties.push(Property::always(SETTLES, |_, world: &World| settles(world)));
        }
        properties
    }
}

fn stands_by_name(world: &World) -> bool {
    use SourceState::{Committing, InDoubt, Loading, LostThere, Retaking, Stopping};
    let about_to_change = |action: &SourceAction| matches!(action, SourceAction::Resume | SourceAction::Destroy);
    world.source.as_ref().is_some_and(|source| {
        matches!(source.machine.state(), Stopping | Loading | Committing | InDoubt | Retaking | LostThere)
            || source.todo.iter().any(about_to_change)
    })
}

/// Whether both sides come to an end by themselves; the source may need a person only if its guest ran and ended at the target, or
/// if the receiver was killed.
fn settles(world: &World) -> bool {
    let end = world.clone().settle();
    let source = end.source_state().is_none_or(|state| state.is_end() || end.waits_for_a_person(state));
    let target = matches!(end.target_state(), None | Some(TargetState::Running | TargetState::Discarded));
    source && target && end.wrong.is_none() && end.a_person_can_tell()
}

#[test]
fn no_reachable_state_breaks_an_invariant() {
    let checker = Handover { out: &[], disks: ALL }.checker().threads(2).spawn_bfs().join();
    println!(
        "hand-over: {} different states, {} transitions, at most {} steps deep",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth()
    );
    checker.assert_properties();
    assert_eq!(checker.unique_state_count(), STATES);
}

/// A checker that never gets anywhere finds nothing: every state of each machine and every word must be among what is reached.
#[test]
fn every_state_is_reached_and_every_word_said() {
    let model = Handover { out: &[], disks: ALL };
    let mut pending = model.init_states();
    let mut worlds: HashSet<_> = pending.iter().cloned().collect();
    while let Some(world) = pending.pop() {
        pending.extend(model.next_states(&world).into_iter().filter(|next| worlds.insert(next.clone())));
    }
    assert_eq!(worlds.len(), STATES);
    let sources: HashSet<_> = worlds.iter().filter_map(World::source_state).collect();
    let targets: HashSet<_> = worlds.iter().filter_map(World::target_state).collect();
    let keepers: HashSet<_> = worlds.iter().filter_map(|world| Some(world.keeper.as_ref()?.state())).collect();
    let said: HashSet<_> = worlds.iter().flat_map(|world| &world.said).collect();
    assert_eq!((sources.len(), targets.len(), keepers.len()), (12, 7, 4));
    assert_eq!(said.len(), 13, "state, 3 orders, 9 answers: {said:?}");
    let records: Vec<_> = [None, Some(Phase::OnItsWay), Some(Phase::Moved)]
        .into_iter()
        .filter(|record| worlds.iter().any(|world| world.record == *record && world.source.is_none()))
        .collect();
    assert_eq!(records.len(), 3, "what a source that starts again may find");
    let again = |world: &&World| world.source.is_none() && world.source_copy == Copy::Running;
    assert!(worlds.iter().any(|world| again(&world) && world.ran_there), "started here after it had run there");
    assert!(worlds.iter().any(|world| world.target.is_none() && world.target_copy == Copy::Running));
}

#[test]
fn undisturbed_the_guest_moves() {
    let end = World::new(Disks::Locked).settle();
    assert_eq!((end.source_state(), end.target_state()), (Some(SourceState::Moved), Some(TargetState::Running)));
    assert_eq!((end.source_copy, end.target_copy, end.locks), (Copy::Gone, Copy::Running, Some(Side::Target)));
    assert_eq!((end.record, end.arrived), (Some(Phase::Moved), true));
}

/// Takes rules out and prints a way to the damage.
#[track_caller]
fn assert_breaks(out: Out, disks: &'static [Disks], property: &'static str) {
    let wanted = HasDiscoveries::AllOf(BTreeSet::from([property]));
    let checker = Handover { out, disks }.checker().finish_when(wanted).spawn_bfs().join();
    let Some(path) = checker.discovery(property) else {
        panic!("without {out:?}, \"{property}\" still holds in all {} states", checker.unique_state_count());
    };
    println!("without {out:?}, \"{property}\" does not hold:");
    for step in path.into_actions() {
        println!("    {step:?}");
    }
}

#[test]
fn if_only_a_delivered_go_counted_two_copies_would_run() {
    for disks in [LOCKS, LUN] {
        assert_breaks(&[Broken::GoCountsOnlyIfDelivered], disks, NEVER_TWO);
    }
}

#[test]
fn if_the_target_started_without_the_locks_a_guest_would_run_without() {
    assert_breaks(&[Broken::TargetStartsUnlocked], LOCKS, LOCKED);
}

/// A target that lies can make the source give up its copy or take it back. It cannot make it run beside another.
#[test]
fn whatever_the_target_says_two_copies_never_run() {
    let checker = Handover { out: &[Broken::AnswersAreTrue], disks: LOCKS }.checker().spawn_bfs().join();
    println!("with a lying target: {} different states", checker.unique_state_count());
    checker.assert_no_discovery(NEVER_TWO);
    checker.assert_no_discovery(LOCKED);
}

/// The locks are the second line: they keep a person's mistake from making two running copies.
#[test]
fn if_a_person_were_mistaken_only_the_locks_would_keep_two_copies_from_running() {
    let checker = Handover { out: &[Broken::PersonSaysNotRunningNow], disks: LOCKS }.checker().spawn_bfs().join();
    checker.assert_no_discovery(NEVER_TWO);
    checker.assert_no_discovery(LOCKED);
    assert_breaks(&[Broken::PersonSaysNotRunningNow, Broken::TargetStartsUnlocked], LOCKS, NEVER_TWO);
    assert_breaks(&[Broken::PersonSaysNotRunningNow], LUN, NEVER_TWO);
}

#[test]
fn if_the_source_resumed_without_the_locks_a_guest_would_run_without() {
    assert_breaks(&[Broken::SourceResumesUnlocked], LOCKS, LOCKED);
}

#[test]
fn if_the_keeper_forgot_a_start_the_guest_would_go_back_in_time() {
    assert_breaks(&[Broken::KeeperForgetsStarting], LOCKS, NEVER_BACK);
}

#[test]
fn if_starting_were_said_after_the_start_the_guest_would_go_back_in_time() {
    assert_breaks(&[Broken::StartingSaidTooLate], LOCKS, NEVER_BACK);
}

#[test]
fn if_a_discarded_copy_could_start_the_guest_would_go_back_in_time() {
    assert_breaks(&[Broken::DiscardIsNotForEver], LOCKS, NEVER_BACK);
}

#[test]
fn if_a_time_out_were_an_answer_the_guest_would_go_back_in_time() {
    assert_breaks(&[Broken::TimeOutIsAnAnswer], LOCKS, NEVER_BACK);
}

#[test]
fn if_a_person_only_saw_that_it_does_not_run_there_now_it_could_start_there_later() {
    assert_breaks(&[Broken::PersonSaysNotRunningNow], LOCKS, NEVER_BACK);
}

/// The record is what a source that starts again knows.
#[test]
fn if_go_came_before_the_record_two_copies_would_run() {
    assert_breaks(&[Broken::RecordComesBeforeGo], LOCKS, RECORDED);
    assert_breaks(&[Broken::RecordComesBeforeGo], LOCKS, NEVER_BACK);
    assert_breaks(&[Broken::RecordComesBeforeGo], LUN, NEVER_TWO);
}

#[test]
fn if_a_start_did_not_heed_the_record_two_copies_would_run() {
    assert_breaks(&[Broken::StartHeedsTheRecord], LOCKS, NEVER_BACK);
    assert_breaks(&[Broken::StartHeedsTheRecord], LUN, NEVER_TWO);
}

#[test]
fn if_a_guest_that_has_moved_left_no_record_two_copies_would_run() {
    assert_breaks(&[Broken::MovedIsRecorded], LUN, NEVER_TWO);
}

#[test]
fn if_a_receiver_that_knows_nothing_said_discarded_the_guest_would_go_back_in_time() {
    assert_breaks(&[Broken::UnknownIsNoAnswer], LOCKS, NEVER_BACK);
    assert_breaks(&[Broken::UnknownIsNoAnswer], LUN, NEVER_TWO);
}
