//! The model's world when nothing bad happens any more: what every state leads to without further faults.

use super::model::{Said, Step, World};
use super::tests::this_move;
use super::*;
use std::collections::VecDeque;

impl World {
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
            return Some(Step::SourceActs { works: true });
        }
        if target.is_some_and(|target| !target.todo.is_empty()) {
            return Some(Step::TargetActs { works: true });
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
