-- One event per checkout, with the running state that an on-demand view needs. activity_score counts the
-- household's baskets, each halved for every 7 days since it was paid. It is kept at the event's own time
-- and can be carried to any later moment by the elapsed time alone.

CREATE TEMP TABLE activity AS
WITH weighted AS (
    SELECT *, epoch(bought_at - getvariable('origin')) / (7 * 86400.0) AS half_lives,
           sum(baskets) OVER (PARTITION BY user_id ORDER BY bought_at)::BIGINT AS total
    FROM baskets
)
SELECT user_id,
       bought_at                                                       AS event_timestamp,
       bought_at + to_seconds(5 + (31 * user_id + products) % 55)      AS created,
       cents / 100.0                                                   AS basket_amount,
       products                                                        AS basket_products,
       coupons > 0                                                     AS basket_coupon_used,
       total                                                           AS baskets_total,
       epoch(bought_at - first_basket) / 86400.0 / nullif(total - 1, 0) AS days_between_baskets,
       epoch(first_basket)::BIGINT                                     AS first_basket_at,
       epoch(bought_at)::BIGINT                                        AS last_basket_at,
       sum(baskets * pow(2, half_lives)) OVER past * pow(2, -half_lives) AS activity_score
FROM weighted
JOIN users USING (user_id)
WINDOW past AS (PARTITION BY user_id ORDER BY bought_at ROWS UNBOUNDED PRECEDING);
