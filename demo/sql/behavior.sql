-- Daily snapshots of what a household bought in the last 7 and 30 days. The snapshot at midnight number m
-- covers days m - 7 to m - 1 and m - 30 to m - 1: everything strictly before its own event timestamp.
-- Households without a basket in the last 30 days get no row, so theirs expire by the view's ttl.

CREATE TEMP TABLE behavior AS
WITH daily AS (
    SELECT user_id, day,
           sum(baskets)::BIGINT AS baskets,
           sum(cents)::BIGINT   AS cents,
           sum(coupons)::BIGINT AS coupons,
           max(bought_at)       AS last_basket
    FROM baskets
    GROUP BY user_id, day
),
-- A purchase of a product counts from the snapshot after it until it leaves the window, or until the next
-- purchase of the same product takes over: a running sum of these steps is the number of distinct products.
purchases AS (
    SELECT user_id, day, coalesce(lead(day) OVER (PARTITION BY user_id, product_id ORDER BY day), 9999) AS next_day
    FROM (SELECT DISTINCT user_id, product_id, day FROM lines)
),
steps AS (
    SELECT user_id, m, sum(step_7)::BIGINT AS step_7, sum(step_30)::BIGINT AS step_30
    FROM (
        SELECT user_id, day + 1 AS m, 1 AS step_7, 1 AS step_30 FROM purchases
        UNION ALL
        SELECT user_id, least(day + 7, next_day) + 1, -1, 0 FROM purchases
        UNION ALL
        SELECT user_id, least(day + 30, next_day) + 1, 0, -1 FROM purchases
    )
    GROUP BY user_id, m
),
favourites AS (
    SELECT user_id, m, arg_max(store_id, (visits, last_visit, store_id)) AS store_id
    FROM (
        SELECT user_id, m, store_id, sum(baskets) AS visits, max(bought_at) AS last_visit
        FROM (SELECT *, unnest(range(day + 1, day + 31)) AS m FROM baskets)
        GROUP BY user_id, m, store_id
    )
    GROUP BY user_id, m
),
grid AS (
    SELECT user_id, unnest(range(first_day + 1, getvariable('snapshots') + 1)) AS m
    FROM users
),
windows AS (
    SELECT grid.user_id, grid.m,
           sum(daily.cents) OVER week                                                AS cents_7,
           sum(daily.cents) OVER month                                               AS cents_30,
           coalesce(sum(daily.baskets) OVER week, 0)                                 AS baskets_7,
           sum(daily.baskets) OVER month                                             AS baskets_30,
           sum(steps.step_7) OVER past                                               AS products_7,
           sum(steps.step_30) OVER past                                              AS products_30,
           coalesce(sum(daily.coupons) OVER week, 0)                                 AS coupons_7,
           sum(daily.coupons) OVER month                                             AS coupons_30,
           count(daily.day) OVER month                                               AS shopping_days_30,
           max(daily.last_basket) OVER past                                          AS last_basket
    FROM grid
    LEFT JOIN daily ON daily.user_id = grid.user_id AND daily.day = grid.m - 1
    LEFT JOIN steps ON steps.user_id = grid.user_id AND steps.m = grid.m
    WINDOW week AS (PARTITION BY grid.user_id ORDER BY grid.m ROWS BETWEEN 6 PRECEDING AND CURRENT ROW),
           month AS (PARTITION BY grid.user_id ORDER BY grid.m ROWS BETWEEN 29 PRECEDING AND CURRENT ROW),
           past AS (PARTITION BY grid.user_id ORDER BY grid.m ROWS UNBOUNDED PRECEDING)
)
SELECT windows.user_id,
       midnight                                                                            AS event_timestamp,
       midnight + INTERVAL 2 HOUR + to_minutes((37 * m) % 60)                              AS created,
       coalesce(cents_7, 0) / 100.0                                                  AS purchase_amount_7d,
       cents_30 / 100.0                                                              AS purchase_amount_30d,
       baskets_7::BIGINT                                                             AS baskets_7d,
       baskets_30::BIGINT                                                            AS baskets_30d,
       products_7::BIGINT                                                            AS distinct_products_7d,
       products_30::BIGINT                                                           AS distinct_products_30d,
       coupons_7::BIGINT                                                             AS coupons_used_7d,
       coupons_30::BIGINT                                                            AS coupons_used_30d,
       shopping_days_30::BIGINT                                                      AS shopping_days_30d,
       cents_7 / 100.0 / nullif(baskets_7, 0)                                        AS average_basket_7d,
       cents_30 / 100.0 / baskets_30                                                 AS average_basket_30d,
       epoch(midnight - last_basket) / 86400.0                                             AS days_since_last_basket,
       'store_' || favourites.store_id                                               AS favourite_store
FROM (SELECT *, getvariable('origin') + to_days(m::INTEGER) AS midnight FROM windows) AS windows
JOIN favourites USING (user_id, m)
WHERE baskets_30 > 0;
