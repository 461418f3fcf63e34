//! The invariants of the hand-over, checked in every state that can be reached, and what the checker says when a rule is taken out.

use super::model::{Broken, Copy, DESTROYED, Out, Side, Step, WENT_BACK, World};
use super::{SourceAction, SourceState, TargetState};
use stateright::{Checker, HasDiscoveries, Model, Property};
use std::collections::{BTreeSet, HashSet};

/// How many different states can be reached: fewer, and the checker looks at less than it did.
const STATES: usize = 8384;

/// The world as a model, with all rules or without some.
struct Handover {
    out: Out,
}

const NEVER_TWO: &str = "I1: never two copies that run";
const NEVER_BACK: &str = "I2: no copy goes on that the guest has left behind";
const NEVER_DESTROYED: &str = "I3: no copy is destroyed unless the guest runs or ran elsewhere";
const NEVER_NONE: &str = "I3: while no process is killed, there is a copy";
const NAMED: &str = "I3: a guest that stands still is in a state that says so";
const LOCKED: &str = "I4: who runs holds the locks";
const SETTLES: &str = "I5: without further faults the move ends, or waits for a person";

impl Model for Handover {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::new()]
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
                (world.source_copy != Copy::Running || world.locks == Some(Side::Source))
                    && (world.target_copy != Copy::Running || world.locks == Some(Side::Target))
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
    source && target && end.wrong.is_none()
}

#[test]
fn no_reachable_state_breaks_an_invariant() {
    let checker = Handover { out: &[] }.checker().threads(2).spawn_bfs().join();
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
    let model = Handover { out: &[] };
    let mut worlds = HashSet::from([World::new()]);
    let mut pending = model.init_states();
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
}

#[test]
fn undisturbed_the_guest_moves() {
    let end = World::new().settle();
    assert_eq!((end.source_state(), end.target_state()), (Some(SourceState::Moved), Some(TargetState::Running)));
    assert_eq!((end.source_copy, end.target_copy, end.locks), (Copy::Gone, Copy::Running, Some(Side::Target)));
}

/// Takes rules out and prints a way to the damage.
#[track_caller]
fn assert_breaks(out: Out, property: &'static str) {
    let wanted = HasDiscoveries::AllOf(BTreeSet::from([property]));
    let checker = Handover { out }.checker().finish_when(wanted).spawn_bfs().join();
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
    assert_breaks(&[Broken::GoCountsOnlyIfDelivered], NEVER_TWO);
}

#[test]
fn if_the_target_started_without_the_locks_a_guest_would_run_without() {
    assert_breaks(&[Broken::TargetStartsUnlocked], LOCKED);
}

/// A target that lies can make the source give up its copy or take it back. It cannot make it run beside another.
#[test]
fn whatever_the_target_says_two_copies_never_run() {
    let checker = Handover { out: &[Broken::AnswersAreTrue] }.checker().spawn_bfs().join();
    println!("with a lying target: {} different states", checker.unique_state_count());
    checker.assert_no_discovery(NEVER_TWO);
    checker.assert_no_discovery(LOCKED);
}

/// The locks are the second line: they keep a person's mistake from making two running copies.
#[test]
fn if_a_person_were_mistaken_only_the_locks_would_keep_two_copies_from_running() {
    let checker = Handover { out: &[Broken::PersonSaysNotRunningNow] }.checker().spawn_bfs().join();
    checker.assert_no_discovery(NEVER_TWO);
    checker.assert_no_discovery(LOCKED);
    assert_breaks(&[Broken::PersonSaysNotRunningNow, Broken::TargetStartsUnlocked], NEVER_TWO);
}

#[test]
fn if_the_source_resumed_without_the_locks_a_guest_would_run_without() {
    assert_breaks(&[Broken::SourceResumesUnlocked], LOCKED);
}

#[test]
fn if_the_keeper_forgot_a_start_the_guest_would_go_back_in_time() {
    assert_breaks(&[Broken::KeeperForgetsStarting], NEVER_BACK);
}

#[test]
fn if_starting_were_said_after_the_start_the_guest_would_go_back_in_time() {
    assert_breaks(&[Broken::StartingSaidTooLate], NEVER_BACK);
}

#[test]
fn if_a_discarded_copy_could_start_the_guest_would_go_back_in_time() {
    assert_breaks(&[Broken::DiscardIsNotForEver], NEVER_BACK);
}

#[test]
fn if_a_time_out_were_an_answer_the_guest_would_go_back_in_time() {
    assert_breaks(&[Broken::TimeOutIsAnAnswer], NEVER_BACK);
}

#[test]
fn if_a_person_only_saw_that_it_does_not_run_there_now_it_could_start_there_later() {
    assert_breaks(&[Broken::PersonSaysNotRunningNow], NEVER_BACK);
}
