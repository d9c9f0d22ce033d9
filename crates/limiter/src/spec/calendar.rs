//! Calendar months in UTC, numbered from January 1970. Proleptic Gregorian, after Howard Hinnant's
//! `civil_from_days` and `days_from_civil` (years here start on 1 March).

use crate::clock::Millis;

const DAY_MS: u64 = 86_400_000;
/// Days from 1 March of year 0 to the epoch.
const EPOCH_DAYS: u64 = 719_468;
const DAYS_PER_ERA: u64 = 146_097;

/// Months from January 1970 to the month of `at`.
pub(super) fn month_of(at: Millis) -> u64 {
    let days = at.get() / DAY_MS + EPOCH_DAYS;
    let (era, day_of_era) = (days / DAYS_PER_ERA, days % DAYS_PER_ERA);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    // March of year y is month 12 y + 2, counted from January of year 0.
    (era * 400 + year_of_era) * 12 + month_from_march + 2 - 1_970 * 12
}

/// The first moment of a month.
pub(super) fn start_of_month(month: u64) -> Millis {
    let from_march = month + 1_970 * 12 - 2;
    let (year, month_from_march) = (from_march / 12, from_march % 12);
    let (era, year_of_era) = (year / 400, year % 400);
    let day_of_year = (153 * month_from_march + 2) / 5;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    Millis((era * DAYS_PER_ERA + day_of_era - EPOCH_DAYS) * DAY_MS)
}
