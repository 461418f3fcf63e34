//! Sets of pages, and the runs that they consist of.
//!
//! Pages are numbered through RAM from 0, the hole below 4 GiB left out: page n is at byte n * 4096 of RAM. A set is a
//! bitmap of 64-bit words, the layout of KVM's dirty log, scanned word by word.

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;
const WORD: u64 = 64;

/// Consecutive pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Number of the first.
    pub first: u64,
    /// How many; at least 1.
    pub pages: u64,
}

impl Run {
    /// Number of the page after the last.
    pub fn end(&self) -> u64 {
        self.first + self.pages
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_BYTES
    }
}

/// A set of pages of a RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// No page of a RAM of `pages`.
    pub fn none(pages: u64) -> Self {
        Self { words: vec![0; pages.div_ceil(WORD) as usize], pages }
    }

    /// Every page of a RAM of `pages`.
    pub fn all(pages: u64) -> Self {
        let mut set = Self::none(pages);
        set.insert(Run { first: 0, pages });
        set
    }

    /// Pages that there are in RAM.
    pub fn ram_pages(&self) -> u64 {
        self.pages
    }

    /// Pages in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Whether `page` is in the set.
    pub fn contains(&self, page: u64) -> bool {
        self.words.get((page / WORD) as usize).is_some_and(|word| word >> (page % WORD) & 1 != 0)
    }

    /// Takes `run` in; what lies outside RAM is left out.
    pub fn insert(&mut self, run: Run) {
        self.each_word(run, |word, mask| *word |= mask);
    }

    /// Lets `run` go.
    pub fn remove(&mut self, run: Run) {
        self.each_word(run, |word, mask| *word &= !mask);
    }

    fn each_word(&mut self, run: Run, change: impl Fn(&mut u64, u64)) {
        let end = run.first.saturating_add(run.pages).min(self.pages);
        let mut page = run.first;
        while page < end {
            let upto = end.min((page / WORD + 1) * WORD);
            let mask = (u64::MAX >> (WORD - (upto - page))) << (page % WORD);
            if let Some(word) = self.words.get_mut((page / WORD) as usize) {
                change(word, mask);
            }
            page = upto;
        }
    }

    /// Takes in what `bitmap` has, whose bit 0 is page `first`, as KVM's dirty log of a memory slot.
    pub fn insert_bitmap(&mut self, first: u64, bitmap: &[u64]) {
        let (skip, shift) = ((first / WORD) as usize, first % WORD);
        for (index, bits) in bitmap.iter().enumerate().filter(|(_, bits)| **bits != 0) {
            if let Some(word) = self.words.get_mut(skip + index) {
                *word |= bits << shift;
            }
            if shift != 0
                && let Some(word) = self.words.get_mut(skip + index + 1)
            {
                *word |= bits >> (WORD - shift);
            }
        }
        self.trim();
    }

    /// Takes in all of `other`, a set of the same RAM.
    pub fn insert_all(&mut self, other: &Self) {
        for (word, bits) in self.words.iter_mut().zip(&other.words) {
            *word |= bits;
        }
    }

    /// Lets all of `other` go, a set of the same RAM.
    pub fn remove_all(&mut self, other: &Self) {
        for (word, bits) in self.words.iter_mut().zip(&other.words) {
            *word &= !bits;
        }
    }

    /// Bits past the last page stay 0.
    fn trim(&mut self) {
        let rest = self.pages % WORD;
        if rest != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= u64::MAX >> (WORD - rest);
        }
    }

    /// The words from page `first` on, a multiple of 64, that cover `pages`.
    pub fn words(&self, first: u64, pages: u64) -> &[u64] {
        let start = ((first / WORD) as usize).min(self.words.len());
        let end = (first.saturating_add(pages).div_ceil(WORD) as usize).clamp(start, self.words.len());
        &self.words[start..end]
    }

    /// Every run, made whole to blocks of `block` pages: those that touch are one.
    pub fn blocks(&self, block: u64) -> Vec<Run> {
        let mut blocks: Vec<Run> = Vec::new();
        for run in self.runs() {
            let first = run.first / block * block;
            let end = run.end().next_multiple_of(block).min(self.pages);
            match blocks.last_mut() {
                Some(last) if last.end() >= first => last.pages = end - last.first,
                _ => blocks.push(Run { first, pages: end - first }),
            }
        }
        blocks
    }

    /// The runs of pages in the set, in order, each as long as it can be.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.runs_in(Run { first: 0, pages: self.pages })
    }

    /// The runs of pages that are in the set and in `within`, in order.
    pub fn runs_in(&self, within: Run) -> impl Iterator<Item = Run> + '_ {
        let end = within.first.saturating_add(within.pages).min(self.pages);
        let mut page = within.first;
        std::iter::from_fn(move || {
            let first = self.next(page, end, false)?;
            let stop = self.next(first, end, true).unwrap_or(end);
            page = stop;
            Some(Run { first, pages: stop - first })
        })
    }

    /// The first page from `page` on and before `end` that is in the set, or is not in it.
    fn next(&self, page: u64, end: u64, absent: bool) -> Option<u64> {
        let mut from = page;
        while from < end {
            let word = *self.words.get((from / WORD) as usize)?;
            let bits = (if absent { !word } else { word }) >> (from % WORD);
            if bits != 0 {
                let found = from + u64::from(bits.trailing_zeros());
                return (found < end).then_some(found);
            }
            from = (from / WORD + 1) * WORD;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn set(pages: u64, runs: &[(u64, u64)]) -> PageSet {
        let mut set = PageSet::none(pages);
        runs.iter().for_each(|&(first, pages)| set.insert(Run { first, pages }));
        set
    }

    fn runs(set: &PageSet) -> Vec<(u64, u64)> {
        set.runs().map(|run| (run.first, run.pages)).collect()
    }

    #[test]
    fn blocks_are_whole_and_end_with_ram() {
        let mut set = PageSet::none(1000);
        for (first, pages) in [(3, 1), (130, 60), (192, 1), (999, 1)] {
            set.insert(Run { first, pages });
        }
        let blocks = [(0, 64), (128, 128), (960, 40)].map(|(first, pages)| Run { first, pages });
        assert_eq!(set.blocks(64), blocks);
        assert!(PageSet::none(1000).blocks(64).is_empty());
    }

    #[test]
    fn runs_join_across_words_and_end_with_ram() {
        let set = set(200, &[(0, 1), (60, 10), (70, 2), (127, 1), (128, 72), (500, 3)]);
        assert_eq!(runs(&set), [(0, 1), (60, 12), (127, 73)]);
        assert_eq!(set.count(), 86);
        let within: Vec<_> = set.runs_in(Run { first: 64, pages: 66 }).map(|run| (run.first, run.pages)).collect();
        assert_eq!(within, [(64, 8), (127, 3)]);
    }

    #[test]
    fn a_bitmap_goes_in_at_any_page() {
        let mut set = PageSet::none(140);
        set.insert_bitmap(3, &[1 << 63 | 1, u64::MAX]);
        assert_eq!(runs(&set), [(3, 1), (66, 65)]);
        set.insert_bitmap(128, &[u64::MAX]);
        assert_eq!(runs(&set), [(3, 1), (66, 74)]);
    }

    #[test]
    fn lengths_out_of_this_world_do_no_harm() {
        let mut set = set(10, &[(u64::MAX, u64::MAX), (9, u64::MAX)]);
        assert_eq!(runs(&set), [(9, 1)]);
        set.remove(Run { first: 0, pages: u64::MAX });
        assert!(set.is_empty());
        assert!(set.words(u64::MAX, u64::MAX).is_empty());
    }

    proptest! {
        #[test]
        fn a_set_is_a_set(pages in 1u64..400, changes in prop::collection::vec((any::<bool>(), 0u64..400, 1u64..130), 0..20)) {
            let (mut set, mut model) = (PageSet::none(pages), BTreeSet::new());
            for (take, first, count) in changes {
                let run = Run { first, pages: count };
                if take { set.insert(run) } else { set.remove(run) }
                for page in first..(first + count).min(pages) {
                    if take { model.insert(page); } else { model.remove(&page); }
                }
            }
            prop_assert_eq!(set.count(), model.len() as u64);
            prop_assert_eq!(set.runs().flat_map(|run| run.first..run.end()).collect::<BTreeSet<_>>(), model);
        }
    }
}
