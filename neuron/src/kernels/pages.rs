//! How large memory is kept.

use mimalloc as _; // it is linked, whoever allocates
use std::ffi::{c_int, c_long};

/// Asks the kernel to keep `numbers`, which nobody has touched yet, in pages of megabytes: weights that are read from end to
/// end then cost a five-hundredth of the address translations, and come a tenth faster. Where it will not, nothing is lost.
pub(crate) fn prefer_huge_pages<T>(numbers: &[T]) {
    #[cfg(target_os = "linux")]
    {
        const HUGE: usize = 2 << 20;
        let start = (numbers.as_ptr() as usize).next_multiple_of(HUGE);
        let end = (numbers.as_ptr() as usize + size_of_val(numbers)) / HUGE * HUGE;
        if start >= end {
            return;
        }
        // SAFETY: the range is within `numbers`, and the advice changes no byte of it. The allocator forbids such pages to the
        // whole process, as they cost much for small things; what does not ask for them still gets none where the
        // system is set to "madvise", which is the usual.
        #[allow(unsafe_code)]
        let done = unsafe {
            libc::prctl(libc::PR_SET_THP_DISABLE, 0, 0, 0, 0) == 0
                && libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) == 0
        };
        if !done {
            let error = std::io::Error::last_os_error();
            tracing::debug!(%error, "the kernel gives no huge pages");
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = numbers;
}

/// Has the allocator, where it is mimalloc, keep what was freed for some seconds. A long step frees and takes tens of megabytes many
/// times; given back within milliseconds, as is the default, each page is taken from the system and cleared anew, which was a
/// fifth of the time of a prompt. To be called before anything large is allocated.
pub fn keep_freed_memory() {
    const PURGE_DELAY: c_int = 15; // `mi_option_purge_delay`
    const MILLISECONDS: c_long = 1000; // of a page; of what lies in arenas ten times as long
    // SAFETY: the function is declared so in mimalloc's header; it sets a number
    #[allow(unsafe_code)]
    unsafe extern "C" {
        safe fn mi_option_set(option: c_int, value: c_long);
    }
    mi_option_set(PURGE_DELAY, MILLISECONDS);
}
