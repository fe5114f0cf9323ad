-- Input: variables transactions (path), weeks (shift), stop (first midnight after the data).
-- Times in here are UTC without a zone; days and snapshots are counted from the first day of the data.
-- Money is counted in cents: integer sums do not depend on the order in which they are added.

SET VARIABLE origin = (
    SELECT date_trunc('day', min(transaction_timestamp)) + to_days(7 * getvariable('weeks'))
    FROM read_parquet(getvariable('transactions'))
);
SET VARIABLE snapshots = date_diff('day', getvariable('origin'), getvariable('stop'));

CREATE TEMP TABLE lines AS
SELECT household_id                                                     AS user_id,
       date_diff('day', getvariable('origin'), bought_at)               AS day,
       bought_at,
       basket_id,
       store_id,
       product_id,
       round(100 * sales_value)::BIGINT                                 AS cents,
       (coupon_disc + coupon_match_disc > 0)::BIGINT                    AS coupons
FROM (SELECT *, transaction_timestamp + to_days(7 * getvariable('weeks')) AS bought_at
      FROM read_parquet(getvariable('transactions')))
WHERE bought_at < getvariable('stop');

-- One row per checkout. The few pairs of baskets that a household paid in the same second are one event.
CREATE TEMP TABLE baskets AS
SELECT user_id,
       day,
       bought_at,
       count(DISTINCT basket_id)  AS baskets,
       min(store_id)              AS store_id,
       count(DISTINCT product_id) AS products,
       sum(cents)::BIGINT         AS cents,
       sum(coupons)::BIGINT       AS coupons
FROM lines
GROUP BY user_id, day, bought_at;

CREATE TEMP TABLE users AS
SELECT user_id, min(bought_at) AS first_basket, min(day) AS first_day
FROM baskets
GROUP BY user_id;
