//! What many connections took goes back to the kernel when they have ended or are idle.

/// Connections that must have ended or become idle for it to be worth while; each had some 17 KiB.
const WORTH: u64 = 256;

/// Of the most connections that were open, or busy, since it was last looked at, so many are not any more that their memory is
/// given back. PURE.
pub fn ebbed(most: u64, left: u64) -> bool {
    most.saturating_sub(left) >= WORTH.max(most / 4)
}

/// Gives free pages of all heaps back: the C library gives back what lies at the end of one alone, and the oldest of its
/// connections may stay there for days. Takes some milliseconds for 100 MB, in which threads that allocate wait.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "the C library's own function, which has no safe form")]
    // SAFETY: it takes no pointer, and locks each heap that it looks at.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_that_end_are_not_worth_it() {
        for (most, left, worth) in [
            (0, 0, false),
            (300, 100, false),
            (300, 10, true),
            (10_000, 9_000, false),
            (10_000, 7_000, true),
            (5, 9, false),
        ] {
            assert_eq!(ebbed(most, left), worth, "{most} {left}");
        }
    }
}
